#include "core/plan/choose.h"

#include <iterator>

namespace jax_flash {
namespace {

// The largest cap for which the exponentials of the softcap kernel fit in float32.
constexpr float kLargestSoftcap = 50;

// Operands that are inputs of kinds of scores.
constexpr int32_t kOfScores = 0
#define JF_SCORE(kind, name, printed, inputs, ...) | (inputs)
#include "../../scores.def"
    ;

// The forward loads the bias in tiles by TMA; gradients load it 8 keys at a time by cp.async.
bool bias_is_served(const Call& call) {
  return call.pass == Pass::kForward ? call.shapes.bias_in_tiles : call.shapes.bias_in_chunks;
}

// Kernels for blocks copy pieces of at least 32 keys. They need a fixed layout and blocks that begin at the
// call's first row and key.
bool serves_blocks(const Call& call) {
  return !call.spec.packed() && !call.spec.moves_band() && call.spec.block_keys % 32 == 0;
}

// The kind of the only score option of a call with these operands; kGeneral with several, or if no kind has
// the option, and kPlain without any.
ScoreKind only_option(const AttentionSpec& spec, int32_t operands) {
  // The plain kernel takes the row maximum before it scales, which needs a positive scale.
  if ((operands & ~(kOfEveryKernel | kOfScores)) || !(spec.scale > 0)) return ScoreKind::kGeneral;
  ScoreKind found = ScoreKind::kPlain;
#define JF_SCORE(kind, name, printed, inputs, option, ...) \
  if ((operands & (inputs)) != 0 || (option))              \
    found = found == ScoreKind::kPlain ? ScoreKind::k##kind : ScoreKind::kGeneral;
#include "../../scores.def"
  return found;
}

// Whether kernels can list the tiles that a boolean mask leaves: it is the only score option, and tiles begin
// at the first row and key. Lists have no fixed order for the additions to dQ, so deterministic gradients do
// not use them.
bool lists_mask_tiles(const Call& call) {
  const AttentionSpec& spec = call.spec;
  const Shapes& s = call.shapes;
  if (only_option(spec, spec.operands) != ScoreKind::kMask || spec.packed() || spec.paged() ||
      spec.moves_band())
    return false;
  if (s.q_rows == 0 || s.k_rows == 0) return false;
  return call.pass == Pass::kForward || (call.pass == Pass::kBackward && !spec.deterministic &&
                                         ListedStep::fit(s.heads, s.kv_heads, s.q_rows, kRowBlock));
}

// Whether the kernels of a kind can load the call's inputs.
bool serves(ScoreKind kind, const Call& call) {
  const AttentionSpec& spec = call.spec;
  const bool served[] = {
#define JF_SCORE(kind, name, printed, inputs, option, served, ...) served,
#include "../../scores.def"
  };
  return served[static_cast<int>(kind)];
}

// The kind of a mask, dropout and a bias of the call's dtype, of which the call has two or all and no other
// option; kGeneral if there is none. Such calls train with padded sequences, or with a learnt bias.
ScoreKind several_options(const Call& call) {
  const AttentionSpec& spec = call.spec;
  const bool mask = spec.has(Operand::kMask), dropout = spec.has(Operand::kDropout);
  const ScoreKind other = only_option(spec, spec.operands & ~bits_of(Operand::kMask, Operand::kDropout));
  if (other == ScoreKind::kPlain && mask && dropout) return ScoreKind::kMaskDropout;
  if (other != ScoreKind::kBias || call.shapes.float_bias || !serves(other, call)) return ScoreKind::kGeneral;
  return dropout ? ScoreKind::kBiasDropout : mask ? ScoreKind::kBiasMask : ScoreKind::kGeneral;
}

// The kernels that compute a call's scores, the most specific first.
struct Candidates {
  ScoreKind kinds[4];

  explicit Candidates(const Call& call) {
    ScoreKind only = only_option(call.spec, call.spec.operands);
    if (!serves(only, call)) only = ScoreKind::kGeneral;
    if (only == ScoreKind::kBias && call.shapes.float_bias) only = ScoreKind::kFloatBias;
    if (only == ScoreKind::kGeneral) only = several_options(call);
    const bool dropout = call.spec.has(Operand::kDropout);  // the general kernel has none
    kinds[2] = dropout ? ScoreKind::kGeneralDropout : ScoreKind::kGeneral;
    kinds[1] = only == ScoreKind::kGeneral ? kinds[2] : only;
    kinds[0] = lists_mask_tiles(call) ? ScoreKind::kListedMask : kinds[1];
    kinds[3] = ScoreKind::kGeneralDropout;
  }

  // The index of the first candidate that the row is built for, or std::size(kinds) if there is none.
  size_t index_for(const KernelRow& row) const {
    size_t i = 0;
    while (i < std::size(kinds) && !row.takes(kinds[i])) ++i;
    return i;
  }
};

bool takes_blocks(const KernelRow& row, const Call& call) {
  ScoreKind score;
  return traits_of(row).takes_blocks(row) || (find_score(row, call, score) && score == ScoreKind::kBlocks);
}

bool runs(const KernelRow& row, const Call& call) {
  const Shapes& s = call.shapes;
  return row.arch->family().of(row.pass) && row.takes(call.loader()) && row.takes(s.dtype) &&
         row.takes(s.kv_dtype) && row.head_dim >= s.head_dim && row.value_dim >= s.value_dim &&
         row.arch->covers(call.device.capability) && traits_of(row).serves(row, call) &&
         (!call.spec.has(Operand::kBlockMask) || takes_blocks(row, call)) &&
         traits_of(row).shared_bytes(row, call) <= call.device.shared_memory;
}

// Prefers one tile for all rows of a head, then the newest arch, then the least padding, then packed heads,
// then the most specific kernel, then the family's choice; the table's order decides among equals.
bool better(const KernelRow& a, const KernelRow& b, const Call& call, const Candidates& scores) {
  if (a.is_one_tile() != b.is_one_tile()) return a.is_one_tile();
  if (a.arch->oldest != b.arch->oldest) return a.arch->oldest > b.arch->oldest;
  const int32_t padded_a = a.head_dim + a.value_dim, padded_b = b.head_dim + b.value_dim;
  if (padded_a != padded_b) return padded_a < padded_b;
  if (a.packs_heads() != b.packs_heads()) return a.packs_heads();
  if (scores.index_for(a) != scores.index_for(b)) return scores.index_for(a) < scores.index_for(b);
  return traits_of(a).better(a, b, call);
}

}  // namespace

const PassTraits& traits_of(const KernelRow& row) { return *row.arch->family().of(row.pass); }

bool find_score(const KernelRow& row, const Call& call, ScoreKind& found) {
  const Candidates scores(call);
  const size_t at = scores.index_for(row);
  if (at == std::size(scores.kinds)) return false;
  found = scores.kinds[at];
  return true;
}

const KernelRow* choose(Pass pass, const Call& call, std::span<const KernelRow> built) {
  const Candidates scores(call);
  const KernelRow* best = nullptr;
  for (const KernelRow& row : built) {
    if (row.pass != pass || scores.index_for(row) == std::size(scores.kinds) || !runs(row, call)) continue;
    if (!best || better(row, *best, call, scores)) best = &row;
  }
  return best;
}

std::string no_kernel(const Call& call, std::span<const KernelRow> built) {
  const Shapes& s = call.shapes;
  std::string rows, last;
  for (const KernelRow& row : built) {
    const bool latent = call.spec.shared_kv() && row.is_latent();  // latent pools have no forward kernel
    if ((row.pass != call.pass && !latent) || !row.takes(s.dtype) || !row.takes(call.loader())) continue;
    std::string name = std::string(row.arch->name) + " d=" + std::to_string(row.head_dim);
    if (row.value_dim != row.head_dim) name += " dv=" + std::to_string(row.value_dim);
    if (name == last) continue;
    rows += (rows.empty() ? "" : ", ") + name;
    last = name;
  }
  return std::string("jax_flash: no CUDA kernel was built for the ") + name_of(call.loader()) + " " +
         name_of(call.pass) + " of " + name_of(s.dtype) + (call.float8_pools() ? " over float8 pools" : "") +
         (call.spec.has(Operand::kBlockMask) ? " with masks.blocks(…)" : "") +
         " with d=" + std::to_string(s.head_dim) + ", dv=" + std::to_string(s.value_dim) + " on sm_" +
         std::to_string(call.device.capability) + " with " + std::to_string(call.device.shared_memory) +
         " bytes of shared memory (built: " + (rows.empty() ? "none" : rows) +
         "); implementation=\"xla\" runs it";
}

}  // namespace jax_flash
