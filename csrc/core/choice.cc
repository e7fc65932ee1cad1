#include "choice.h"

#include <algorithm>
#include <limits>

namespace jax_flash {
namespace {

constexpr const char* kDTypeNames[] = {"float16", "bfloat16", "float32"};
constexpr const char* kPassNames[] = {"forward", "backward", "bias_gradient", "paged_forward", "decode"};

int64_t element_size(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

// sm75 and sm80 code runs on every newer card; a later family only on the cards of its own major version.
bool covers(const KernelRow& row, const Device& device) {
  if (row.capability <= 80) return device.capability >= row.capability;
  return device.capability >= row.capability && device.capability / 10 == row.capability / 10;
}

// Elements of the tiles in shared memory. Without a stage two tiles have one place.
int64_t shared_elements(const KernelRow& row) {
  const int64_t both = row.head_dim + row.value_dim, larger = std::max(row.head_dim, row.value_dim);
  const int64_t m = row.block_m, n = row.block_n, staged = row.stages == 0 ? larger : row.stages * both;
  switch (row.pass) {
    case Pass::kForward:
    case Pass::kPagedForward:  // Q, and `stages` tiles of K and of V
      return m * row.head_dim + n * staged;
    case Pass::kDecode:  // `stages` tiles of K and of V
      return n * staged;
    case Pass::kBackward:  // K and V, `stages` tiles of Q and of dO, P and dS
      return n * both + m * staged + 2 * m * n;
    case Pass::kBiasGradient:  // Q and K, dO and V
      return (m + n) * staged;
  }
  return 0;
}

// Softcaps whose powers of e are float32's.
constexpr float kLargestSoftcap = 50;

// What a call does to scores; kGeneral: more than one thing, or something that has no kernel of its own.
ScoreKind only_option(const AttentionSpec& spec, const Shapes& shapes) {
  struct {
    bool wanted, served;
    ScoreKind kind;
  } const options[] = {
      {spec.has(Operand::kQSegmentIds), true, ScoreKind::kSegments},
      {spec.has(Operand::kAlibiSlopes), true, ScoreKind::kAlibi},
      {spec.has(Operand::kBias), shapes.bias_in_tiles, ScoreKind::kBias},
      {spec.has(Operand::kDropout), true, ScoreKind::kDropoutAlone},
      {spec.softcap > 0, spec.softcap <= kLargestSoftcap, ScoreKind::kSoftcap},
      // The plain kernel takes the row maximum before it scales, which wants a positive scale.
      {spec.has(Operand::kMask) || !(spec.scale > 0), false, ScoreKind::kGeneral},
  };
  ScoreKind found = ScoreKind::kPlain;
  for (const auto& option : options) {
    if (!option.wanted) continue;
    found = found == ScoreKind::kPlain && option.served ? option.kind : ScoreKind::kGeneral;
  }
  return found;
}

// The sm90 family: the copy engine's tensor maps have room for one leading dimension, and its boxes are of
// whole groups of 8 rows of a page, which it cannot widen.
bool serves(const KernelRow& row, const AttentionSpec& spec, const Shapes& shapes) {
  if (row.capability != 90) return true;
  return shapes.leading_rank <= 1 && shapes.page_size % 8 == 0 && shapes.kv_dtype == shapes.dtype &&
         hopper_holds(score_kind(row, spec, shapes), row.head_dim, row.block_n, row.block_m / kHopperRows,
                      row.teams());
}

// Of float8 a decode kernel copies and multiplies 64 features at a time.
bool takes_pool(const KernelRow& row, Pass pass, const Shapes& shapes) {
  return pass != Pass::kDecode || shapes.kv_dtype == shapes.dtype ||
         (row.head_dim % 64 == 0 && row.value_dim % 64 == 0);
}

bool runs(const KernelRow& row, Pass pass, const AttentionSpec& spec, const Shapes& shapes,
          const Device& device) {
  return serves(row, spec, shapes) && row.pass == pass && row.takes(shapes.dtype) &&
         row.head_dim >= shapes.head_dim && row.value_dim >= shapes.value_dim && covers(row, device) &&
         takes_pool(row, pass, shapes) && shared_memory(row, shapes.dtype) <= device.shared_memory;
}

// What decides between tiles of the sm90 family.
struct Tiles {
  bool small;      // of kHopperRows: all find a multiprocessor at once, of which larger ones leave some idle
  bool teams;      // keys or rounds are few
  bool many_keys;  // of those that are left

  Tiles(const AttentionSpec& spec, const Shapes& s, const Device& device) {
    constexpr int64_t kFewOfBand = 1024 + 1;  // a window of 1,024, and the row's own key
    constexpr int64_t kFew = 256, kMany = 1536;
    const bool band = spec.left >= 0 || spec.right >= 0;
    const int64_t keys = keys_in_sight(spec, s);
    // Where every multiprocessor takes one tile of so many rows after another.
    const auto rounds_of = [&](int64_t rows) {
      const int64_t sequences = spec.packed() ? 1 : s.batch;
      return ceil_div(ceil_div(s.q_rows, rows) * s.heads * sequences * s.leading,
                      std::max(1, device.sm_count));
    };
    small = rounds_of(kHopperRows) <= 1;
    // Of packed sequences no more than a bound of their tiles is known here.
    teams =
        keys <= (band ? kFewOfBand : kFew) || (!spec.packed() && few_rounds(rounds_of, rows_differ(spec)));
    many_keys = keys >= kMany;
  }

 private:
  // Keys are few: teams gain more where tiles of queries begin and end than their small tiles of keys lose in
  // between, of which a band's ends also cut less in vain. Rounds are few: the last one of large tiles leaves
  // more of the card idle than that of teams' smaller ones. What a round takes, in rows of large tiles, is
  // measured at d = 64, which alone has teams (docs/hopper-forward.md). Tiles that are not all as long fill
  // the last round up: there every team's has to find its place at once.
  template <class Rounds>
  static bool few_rounds(Rounds rounds_of, bool differ) {
    constexpr int64_t kLarge = 192, kTeam = 128;  // rows
    constexpr int64_t kOneTeam = 164, kBothTeams = 280, kMostRounds = 8, kAtOnce = 2;
    const int64_t large = rounds_of(kLarge), small = rounds_of(kTeam);
    return (differ ? small <= kAtOnce : large <= kMostRounds) &&
           small / 2 * kBothTeams + small % 2 * kOneTeam <= large * kLarge;
  }
};

// The newest family, then the least padding, then of sm90's tiles the small ones, teams', and those of more
// keys where these are wanted; the table's order decides among equals.
bool better(const KernelRow& a, const KernelRow& b, const Tiles& wanted) {
  if (a.capability != b.capability) return a.capability > b.capability;
  if (a.head_dim + a.value_dim != b.head_dim + b.value_dim) {
    return a.head_dim + a.value_dim < b.head_dim + b.value_dim;
  }
  if (a.pass == Pass::kForward && a.capability == 90) {
    const bool small = a.block_m == kHopperRows, teams = a.teams() > 1;
    if (small != (b.block_m == kHopperRows)) return small == wanted.small;
    if (teams != (b.teams() > 1)) return teams == wanted.teams;
    return (a.block_n > b.block_n) == wanted.many_keys && a.block_n != b.block_n;
  }
  return a.pass == Pass::kDecode && a.block_m > b.block_m;
}

// Rows of one chunk where a smaller one would do are wasted.
bool fits_rows(const KernelRow& row, const AttentionSpec& spec, const Shapes& s) {
  return row.block_m == 8 || rows_of_group(spec, s) > 8;
}

}  // namespace

const char* name_of(Pass pass) { return kPassNames[static_cast<int>(pass)]; }

int64_t shared_memory(const KernelRow& row, DType dtype) {
  int64_t others = kBlockStateBytes;
  if (row.capability == 90) others = kHopperStateBytes;
  if (row.pass == Pass::kBackward)
    others += std::max(row.stages, 1) * int64_t{row.block_m} * 8;  // lse and delta of rows
  if (row.pass == Pass::kPagedForward && row.capability != 90)
    others += (row.stages + int64_t{1}) * row.block_n * 16;  // where keys lie
  if (row.pass == Pass::kDecode) {  // O, a few columns at a time, and the softmax of each warp
    const int64_t columns = row.block_m == 8 && row.value_dim % 64 == 0 ? 64 : 32;
    others += int64_t{row.warps} * row.block_m * (4 * (columns + 4) + 8);
  }
  return row.teams() * (shared_elements(row) * element_size(dtype) + others);
}

ScoreKind score_kind(const KernelRow& row, const AttentionSpec& spec, const Shapes& shapes) {
  const ScoreKind only = only_option(spec, shapes);
  if (only == ScoreKind::kPlain || (only == ScoreKind::kDropoutAlone && row.pass == Pass::kForward))
    return only;
  if (row.capability == 90 && row.pass == Pass::kForward && only != ScoreKind::kGeneral) return only;
  return spec.has(Operand::kDropout) && row.pass == Pass::kForward ? ScoreKind::kDropout
                                                                   : ScoreKind::kGeneral;
}

int64_t keys_in_sight(const AttentionSpec& spec, const Shapes& s) {
  const int64_t keys = spec.packed() ? s.k_rows / std::max<int64_t>(1, s.batch) : s.k_rows;
  return spec.left < 0 || spec.right < 0 ? keys : std::min(keys, int64_t{spec.left} + 1 + spec.right);
}

bool rows_differ(const AttentionSpec& spec) {
  bool differ = spec.packed() || spec.paged() || spec.left >= 0 || spec.right >= 0;
  for (Operand operand : {Operand::kQLengths, Operand::kKvLengths, Operand::kQSegmentIds})
    differ |= spec.has(operand);
  return differ;
}

int64_t rows_of_group(const AttentionSpec& spec, const Shapes& s) {
  return s.kv_heads == 0 ? 0 : s.heads / s.kv_heads * (spec.packed() ? 1 : s.q_rows);
}

bool decodes(const AttentionSpec& spec, const Shapes& s) {
  for (Operand operand : {Operand::kQSegmentIds, Operand::kMask, Operand::kBias, Operand::kDropout}) {
    if (spec.has(operand)) return false;
  }
  if (spec.layout == Layout::kVarlen) return false;
  // Rows of float8 are copied 16 bytes at a time.
  if (s.kv_dtype != s.dtype && (s.dtype == DType::kF32 || s.head_dim % 16 || s.value_dim % 16)) return false;
  const int64_t rows = rows_of_group(spec, s), entries = s.leading * s.batch;
  return 0 < s.q_rows && 0 < rows && rows <= (spec.paged() ? kDecodeRows : kDecodeChunk) && 0 < entries &&
         entries <= std::numeric_limits<int32_t>::max();
}

const KernelRow* choose(Pass pass, const AttentionSpec& spec, const Shapes& shapes, const Device& device,
                        std::span<const KernelRow> built) {
  const Tiles wanted(spec, shapes, device);
  const KernelRow* row = nullptr;
  for (const KernelRow& candidate : built) {
    if (pass == Pass::kDecode && !fits_rows(candidate, spec, shapes)) continue;
    if (runs(candidate, pass, spec, shapes, device) && (!row || better(candidate, *row, wanted)))
      row = &candidate;
  }
  return row;
}

std::string no_kernel(Pass pass, const Shapes& shapes, const Device& device,
                      std::span<const KernelRow> built) {
  std::string rows, last;
  for (const KernelRow& row : built) {
    if (row.pass != pass || !row.takes(shapes.dtype)) continue;
    std::string name = std::string(row.family) + " d=" + std::to_string(row.head_dim);
    if (row.value_dim != row.head_dim) name += " dv=" + std::to_string(row.value_dim);
    if (name == last) continue;
    rows += (rows.empty() ? "" : ", ") + name;
    last = name;
  }
  return std::string("jax_flash: no CUDA kernel was built for the ") + name_of(pass) + " of " +
         kDTypeNames[static_cast<int>(shapes.dtype)] + " with d=" + std::to_string(shapes.head_dim) +
         ", dv=" + std::to_string(shapes.value_dim) + " on sm_" + std::to_string(device.capability) +
         " with " + std::to_string(device.shared_memory) +
         " bytes of shared memory (built: " + (rows.empty() ? "none" : rows) +
         "); implementation=\"xla\" runs it";
}

std::string KernelRow::to_string() const {
  std::string text = std::string(family) + " " + name_of(pass);
  for (DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
    if (takes(dtype)) text += std::string(" ") + kDTypeNames[static_cast<int>(dtype)];
  }
  return text + " d=" + std::to_string(head_dim) + " dv=" + std::to_string(value_dim) + " tile " +
         std::to_string(block_m) + "x" + std::to_string(block_n) + " stages " + std::to_string(stages) +
         " warps " + std::to_string(warps);
}

}  // namespace jax_flash
