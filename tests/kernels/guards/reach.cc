#include "reach.h"

#include <iterator>
#include <stdexcept>

#include "core/plan/text.h"

namespace jax_flash::backend {
namespace {

constexpr const char* kVariantNames[] = {"plain",  "clusters", "general",       "dropout",
                                         "all",    "segments", "alibi",         "softcap",
                                         "bias",   "mask",     "deterministic", "general deterministic",
                                         "float8", "split",    "float8 split",  "float8 general"};

// The forward's kernels, by the plan's ScoreKind.
constexpr Variant kVariants[] = {Variant::kPlain,   Variant::kGeneral,  Variant::kAll,
                                 Variant::kDropout, Variant::kSegments, Variant::kAlibi,
                                 Variant::kSoftcap, Variant::kBias,     Variant::kMask};

std::vector<Variant> variants_of(const KernelRow& row, Loader loader) {
  if (row.pass == Pass::kDecode && row.cluster > 1) return {Variant::kPlain};  // a sequence is never split
  switch (row.pass) {
    case Pass::kForward: {
      if (loader == Loader::kPaged) return {Variant::kPlain, Variant::kGeneral, Variant::kFloat8};
      std::vector<Variant> all{std::begin(kVariants), std::end(kVariants)};
      all.push_back(Variant::kCluster);
      return all;
    }
    case Pass::kBackward:
      return {Variant::kPlain, Variant::kGeneral,       Variant::kBias,
              Variant::kMask,  Variant::kDeterministic, Variant::kGeneralDeterministic};
    case Pass::kTangent:
      return {Variant::kPlain, Variant::kGeneral};
    case Pass::kBiasGradient:
      return {Variant::kGeneral, Variant::kBias};
    case Pass::kDecode:
      return {Variant::kSplit, Variant::kGeneral, Variant::kFloat8Split, Variant::kFloat8General};
  }
  return {};
}

DType dtype_of(const KernelRow& row) {
  return row.takes(DType::kF16) ? DType::kF16 : row.takes(DType::kBF16) ? DType::kBF16 : DType::kF32;
}

Aim aim_at(const KernelRow& row, Variant variant) {
  return {row.pass, dtype_of(row), row.head_dim, row.value_dim, row.block_m, variant};
}

// A call that runs this kernel of the row, if there is one: with several tokens of many sequences, whose
// heads share tiles, or with one.
Problem example(const KernelRow& row, Variant variant, bool several) {
  Problem p{};
  AttentionSpec& s = p.spec;
  const auto add = [&](Operand operand) { s.operands |= 1 << static_cast<int32_t>(operand); };
  const Aim aim = aim_at(row, variant);
  s.left = s.right = kUnlimited;
  s.scale = 1;
  s.deterministic = aim.deterministic();
  if (!aim.plain()) s.softcap = 3, add(Operand::kAlibiSlopes);
  if (aim.dropout()) add(Operand::kDropout);
  if (row.pass == Pass::kBiasGradient || variant == Variant::kBias) add(Operand::kBias);
  if (variant == Variant::kMask) add(Operand::kMask);
  if (variant == Variant::kSegments) add(Operand::kQSegmentIds);
  if (variant == Variant::kAlibi) add(Operand::kAlibiSlopes);
  if (variant == Variant::kSoftcap) s.softcap = 3;
  alignas(16) static uint16_t any_bias;
  p.bias.data = p.mask.data = &any_bias, p.bias.column = p.mask.column = 1, p.bias_dtype = aim.dtype;
  p.dtype = p.kv_dtype = aim.dtype;
  if (aim.float8()) p.kv_dtype = DType::kF8E4M3;
  p.batch = p.kv_heads = 1;
  p.heads = row.pass == Pass::kDecode ? row.block_m : 1;
  p.head_dim = row.head_dim, p.value_dim = row.value_dim;
  if (row.head_dim > kMaxHeadDim) s.value_dim = row.value_dim;
  p.q_rows = 1, p.k_rows = 256;
  p.dbias_batch = p.dbias_heads = p.dbias_rows = 1, p.dbias_columns = p.k_rows;
  if (row.takes(Loader::kPaged)) {
    s.layout = Layout::kPaged;
    p.page_size = 64, p.pages = p.table = 4;
  }
  if (several) p.heads = 4, p.q_rows = 16, p.batch = 1 << 12;
  return p;
}

Variant forward_variant(const LaunchPlan& plan) {
  return plan.cluster_size > 1 ? Variant::kCluster : kVariants[static_cast<int>(plan.score)];
}

Variant variant_of(Pass pass, const LaunchPlan& plan, const Problem& p) {
  switch (pass) {
    case Pass::kForward:
      if (!p.paged()) return forward_variant(plan);
      if (p.kv_dtype != p.dtype) return Variant::kFloat8;
      return plan.general() ? Variant::kGeneral : Variant::kPlain;
    case Pass::kBackward:
      if (plan.score == ScoreKind::kBias) return Variant::kBias;
      if (plan.score == ScoreKind::kMask) return Variant::kMask;
      if (p.spec.deterministic)
        return plan.general() ? Variant::kGeneralDeterministic : Variant::kDeterministic;
      return plan.general() ? Variant::kGeneral : Variant::kPlain;
    case Pass::kTangent:
      return plan.general() ? Variant::kGeneral : Variant::kPlain;
    case Pass::kBiasGradient:
      return plan.score == ScoreKind::kBias ? Variant::kBias : Variant::kGeneral;
    case Pass::kDecode:
      if (p.spec.softcap > 0 || p.alibi_slopes || p.draft_mask)
        return p.kv_dtype != p.dtype ? Variant::kFloat8General : Variant::kGeneral;
      if (plan.decode.memory < 0) return p.kv_dtype != p.dtype ? Variant::kFloat8 : Variant::kPlain;
      return p.kv_dtype != p.dtype ? Variant::kFloat8Split : Variant::kSplit;
  }
  return Variant::kPlain;
}

// Whether the plan's score tells that a kernel is this one.
bool by_score(Pass pass, Variant variant) {
  return pass == Pass::kForward || variant == Variant::kBias || variant == Variant::kMask;
}

// Whether a library with only this row would take that call.
bool exists(const KernelRow& row, Variant variant, Device device) {
  device.capability = row.arch->oldest;
  device.always_cluster = variant == Variant::kCluster;
  const auto runs = [&](bool several) {
    const Problem p = example(row, variant, several);
    const Pass pass = row.pass == Pass::kDecode ? Pass::kForward : row.pass;
    const Shapes shapes = shapes_of(p);
    const LaunchPlan found = plan({pass, p.spec, shapes, device}, {&row, 1});
    return found.kernel == 0 && (!by_score(row.pass, variant) || variant_of(row.pass, found, p) == variant);
  };
  return runs(false) || (row.pass == Pass::kForward && row.takes(Loader::kPaged) && runs(true));
}

}  // namespace

std::optional<Aim> Reach::aim(int64_t turn, Loader loader, std::initializer_list<Pass> passes) {
  if (kernels_.empty()) {
    for (int32_t i = 0; i < static_cast<int32_t>(rows_.size()); ++i) {
      for (Pass pass : passes) {
        if (rows_[i].pass != pass || !rows_[i].takes(loader)) continue;
        if (rows_[i].arch->oldest > device_.capability) continue;
        for (Variant variant : variants_of(rows_[i], loader)) {
          if (exists(rows_[i], variant, device_)) kernels_.emplace_back(i, variant);
        }
      }
    }
  }
  aimed_ = -1;
  if (turn % 4 == 3 || kernels_.empty()) return std::nullopt;
  const auto [kernel, variant] = kernels_[static_cast<size_t>(turn - (turn + 1) / 4) % kernels_.size()];
  had_turn_.emplace(kernel, variant);
  aimed_ = kernel, variant_ = variant;
  return aim_at(rows_[kernel], variant);
}

void Reach::note(const LaunchPlan& plan, int32_t kernel, const Problem& problem) {
  const Pass pass = rows_[kernel].pass;
  const int64_t blocks = pass == Pass::kDecode     ? int64_t{plan.decode.columns} * plan.decode.ranges
                         : pass == Pass::kBackward ? plan.keys.blocks
                                                   : plan.queries.blocks;
  if (blocks > 0) ++launches_[{kernel, variant_of(pass, plan, problem)}];
}

std::string Reach::report() const {
  std::string text, missing;
  for (int32_t i = 0; i < static_cast<int32_t>(rows_.size()); ++i) {
    std::string counts;
    for (auto at = launches_.lower_bound({i, Variant{}}); at != launches_.end() && at->first.first == i;
         ++at) {
      counts += std::string(counts.empty() ? "" : ", ") + kVariantNames[static_cast<int>(at->first.second)] +
                " " + std::to_string(at->second);
    }
    if (!counts.empty()) text += "  " + text_of(rows_[i]) + ": " + counts + "\n";
  }
  for (const auto& [kernel, variant] : had_turn_) {
    if (launches_.contains({kernel, variant})) continue;
    missing += "\n  " + text_of(rows_[kernel]) + ": " + kVariantNames[static_cast<int>(variant)];
  }
  if (!missing.empty()) throw std::runtime_error(text + "kernels not reached in their turn:" + missing);
  return text + std::to_string(had_turn_.size()) + " of the " + std::to_string(kernels_.size()) +
         " kernels behind these passes had their turn and were reached";
}

}  // namespace jax_flash::backend
