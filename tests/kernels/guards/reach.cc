#include "reach.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>

#include "core/plan/text.h"

namespace jax_flash::backend {
namespace {

constexpr const char* kVariantNames[] = {
#define JF_SCORE(kind, name, ...) #name,
#include "scores.def"
    "clusters", "deterministic", "general deterministic", "float8",
    "split",    "float8 split",  "float8 general"};

// The kinds of scores whose kernels of gradients are aimed at one by one.
const std::vector<Variant> kOfBackward{Variant::kBias,     Variant::kMask,       Variant::kListedMask,
                                       Variant::kRanges,   Variant::kBlocks,     Variant::kMaskDropout,
                                       Variant::kBiasMask, Variant::kBiasDropout};
const std::vector<Variant> kOfBiasGradient{Variant::kBias, Variant::kBiasMask, Variant::kBiasDropout};

std::vector<Variant> with(std::vector<Variant> all, const std::vector<Variant>& others) {
  all.insert(all.end(), others.begin(), others.end());
  return all;
}
// The plan's own variant if it is one of these, else `other`.
Variant own_or(const LaunchPlan& plan, const std::vector<Variant>& of, Variant other) {
  const auto own = static_cast<Variant>(plan.score);
  return std::ranges::find(of, own) != of.end() ? own : other;
}

std::vector<Variant> variants_of(const KernelRow& row, Loader loader) {
  if (row.pass == Pass::kDecode && row.design == Design::kCluster) {  // only unequal lengths split a sequence
    if (loader == Loader::kPaged) return {Variant::kPlain, Variant::kCluster};
    return {Variant::kPlain};
  }
  switch (row.pass) {
    case Pass::kForward: {
      if (loader == Loader::kPaged) return {Variant::kPlain, Variant::kGeneral, Variant::kFloat8};
      std::vector<Variant> all{Variant::kCluster};
      for (int32_t kind = 0; kind < kScoreKinds; ++kind) all.push_back(static_cast<Variant>(kind));
      return all;
    }
    case Pass::kBackward:
      return with(
          {Variant::kPlain, Variant::kGeneral, Variant::kDeterministic, Variant::kGeneralDeterministic},
          kOfBackward);
    case Pass::kTangent:
      return {Variant::kPlain, Variant::kGeneral};
    case Pass::kBiasGradient:
      return with({Variant::kGeneral}, kOfBiasGradient);
    case Pass::kDecode:
      return {Variant::kSplit, Variant::kGeneral, Variant::kFloat8Split, Variant::kFloat8General};
    case Pass::kAppend:  // has a driver of its own
      return {};
  }
  return {};
}

// SMs of a plan with persistent CTAs: few enough for each team of a CTA to have more than one query tile, and
// enough for a 2-CTA cluster.
constexpr int32_t kFewSms = 2;
constexpr int32_t kTokens = 16;  // tokens of an example that has several

DType dtype_of(const KernelRow& row) {
  return row.takes(DType::kF16) ? DType::kF16 : row.takes(DType::kBF16) ? DType::kBF16 : DType::kF32;
}

Aim aim_at(const KernelRow& row, Variant variant) {
  return {row.pass,        dtype_of(row), row.head_dim,
          row.value_dim,   row.block_m,   row.is_one_tile() ? row.block_n : 0,
          row.is_latent(), variant};
}

// Examples differ in their tokens (one, or several whose query heads share tiles) and their options (the
// usual ones or, because these tiles support no others, a draft mask).
struct Style {
  bool several, drafted;
};
constexpr Style kStyles[] = {{false, false}, {true, false}, {true, true}};

// A call that this kernel of the row runs.
Problem example_of(const KernelRow& row, Variant variant, Style style) {
  Problem p{};
  AttentionSpec& s = p.spec;
  const auto add = [&](Operand operand) { s.operands |= 1 << static_cast<int32_t>(operand); };
  const Aim aim = aim_at(row, variant);
  s.left = s.right = kUnlimited;
  s.align = Align::kBottomRight;
  s.scale = 1;
  s.deterministic = aim.deterministic();
  if (!aim.plain() && style.drafted) add(Operand::kDraftMask), p.draft_rows = kTokens;
  if (!aim.plain() && !style.drafted) s.softcap = 3, add(Operand::kAlibiSlopes);
  if (aim.dropout()) add(Operand::kDropout);
  if (row.pass == Pass::kBiasGradient || aim.bias()) add(Operand::kBias);
  if (aim.mask()) add(Operand::kMask);
  if (variant == Variant::kSegments) add(Operand::kQSegmentIds), add(Operand::kKvSegmentIds);
  if (variant == Variant::kRanges) add(Operand::kRanges), p.limits = 2;
  if (variant == Variant::kBlocks) {
    add(Operand::kBlockMask);
    s.block_rows = s.block_keys = 128, p.mask_rows = 1, p.mask_columns = 2;
  }
  if (variant == Variant::kAlibi) add(Operand::kAlibiSlopes);
  if (variant == Variant::kSoftcap) s.softcap = 3;
  if (variant == Variant::kSplit || variant == Variant::kFloat8Split) s.num_splits = 2;
  alignas(16) static uint16_t any_bias;
  p.bias.data = p.mask.data = &any_bias, p.bias.column = p.mask.column = 1, p.bias_dtype = aim.dtype;
  p.dtype = p.kv_dtype = aim.dtype;
  if (aim.float8()) p.kv_dtype = DType::kF8E4M3;
  p.batch = p.kv_heads = 1;
  p.heads = row.pass == Pass::kDecode ? row.block_m : 1;
  p.head_dim = row.head_dim, p.value_dim = row.value_dim;
  if (row.is_latent()) s.value_dim = row.value_dim;
  p.q_rows = 1, p.k_rows = aim.most_rows > 0 ? aim.most_rows : 256;
  p.dbias_batch = p.dbias_heads = p.dbias_rows = 1, p.dbias_columns = p.k_rows;
  if (row.takes(Loader::kPaged)) {
    s.layout = Layout::kPaged;
    p.page_size = 64, p.pages = p.table = 4;
  }
  if (style.several) p.heads = 4, p.q_rows = kTokens, p.batch = kFewSms;
  return p;
}

Variant forward_variant(const LaunchPlan& plan) {
  return plan.cluster_size > 1 ? Variant::kCluster : static_cast<Variant>(plan.score);
}

Variant variant_of(Pass pass, const LaunchPlan& plan, const Problem& p) {
  switch (pass) {
    case Pass::kForward:
      if (!p.paged()) return forward_variant(plan);
      if (p.kv_dtype != p.dtype) return Variant::kFloat8;
      return plan.general() ? Variant::kGeneral : Variant::kPlain;
    case Pass::kBackward:
      if (p.spec.deterministic)
        return own_or(plan, kOfBackward,
                      plan.general() ? Variant::kGeneralDeterministic : Variant::kDeterministic);
      return own_or(plan, kOfBackward, plan.general() ? Variant::kGeneral : Variant::kPlain);
    case Pass::kTangent:
      return plan.general() ? Variant::kGeneral : Variant::kPlain;
    case Pass::kBiasGradient:
      return own_or(plan, kOfBiasGradient, Variant::kGeneral);
    case Pass::kDecode:
      if (p.spec.softcap > 0 || p.spec.has(Operand::kAlibiSlopes) || p.spec.has(Operand::kDraftMask))
        return p.kv_dtype != p.dtype ? Variant::kFloat8General : Variant::kGeneral;
      if (plan.decode.memory >= 0 && plan.cluster_size > 1) return Variant::kCluster;
      if (plan.decode.memory < 0) return p.kv_dtype != p.dtype ? Variant::kFloat8 : Variant::kPlain;
      return p.kv_dtype != p.dtype ? Variant::kFloat8Split : Variant::kSplit;
    case Pass::kAppend:
      break;
  }
  return Variant::kPlain;
}

// The number of CTAs of a plan's kernel.
int64_t blocks_of(Pass pass, const LaunchPlan& plan) {
  return pass == Pass::kDecode     ? int64_t{plan.decode.columns} * plan.decode.ranges
         : pass == Pass::kBackward ? plan.keys.blocks
                                   : plan.queries.blocks;
}

}  // namespace

std::optional<Aim> Reach::aim(int64_t turn, Loader loader, std::initializer_list<Pass> passes) {
  if (kernels_.empty()) {
    for (int32_t i = 0; i < static_cast<int32_t>(rows_.size()); ++i) {
      for (Pass pass : passes) {
        if (rows_[i].pass != pass || !rows_[i].takes(loader)) continue;
        if (rows_[i].arch->oldest > device_.capability) continue;
        for (Variant variant : variants_of(rows_[i], loader)) {
          if (example(Kernel{i, variant})) kernels_.emplace_back(i, variant);
        }
      }
    }
  }
  aimed_.reset();
  if (turn % 4 == 3 || kernels_.empty()) return std::nullopt;
  aimed_ = kernels_[static_cast<size_t>(turn - (turn + 1) / 4) % kernels_.size()];
  had_turn_.insert(*aimed_);
  return aim_at(rows_[aimed_->first], aimed_->second);
}

// Plans without the rows that would be preferred to the targeted one.
LaunchPlan Reach::plan(const std::optional<Kernel>& aimed, Pass pass, const Problem& p) const {
  Device device = device_;
  const Shapes shapes = shapes_of(p);
  if (!aimed) return jax_flash::plan({pass, p.spec, shapes, device}, rows_);
  const KernelRow& wanted = rows_[aimed->first];
  device.capability = wanted.arch->oldest;
  device.always_cluster = aimed->second == Variant::kCluster;
  std::vector<KernelRow> rows;
  std::vector<int32_t> index;
  for (int32_t i = 0; i < static_cast<int32_t>(rows_.size()); ++i) {
    const bool takes_few = rows_[i].pass == Pass::kDecode && wanted.pass != Pass::kDecode;
    if (i != aimed->first && (rows_[i].pass == wanted.pass || takes_few)) continue;
    rows.push_back(rows_[i]), index.push_back(i);
  }
  LaunchPlan chosen = jax_flash::plan({pass, p.spec, shapes, device}, rows);
  // Some rows are chosen only if their tiles fill whole waves.
  if (chosen.persistent_ctas > 0 || chosen.kernel < 0) {
    device.sm_count = kFewSms;
    chosen = jax_flash::plan({pass, p.spec, shapes, device}, rows);
  }
  for (int32_t* kernel : {&chosen.kernel, &chosen.decode_kernel}) {
    if (*kernel >= 0) *kernel = index[*kernel];
  }
  return chosen;
}

bool Reach::takes(const std::optional<Kernel>& aimed, const Problem& p) const {
  const Pass pass = rows_[aimed->first].pass;
  const LaunchPlan found = plan(aimed, pass == Pass::kDecode ? Pass::kForward : pass, p);
  return (found.kernel == aimed->first || found.decode_kernel == aimed->first) &&
         blocks_of(pass, found) > 0 && variant_of(pass, found, p) == aimed->second;
}

std::optional<Problem> Reach::example(const std::optional<Kernel>& aimed) const {
  for (Style style : kStyles) {
    const Problem p = example_of(rows_[aimed->first], aimed->second, style);
    if (takes(aimed, p)) return p;
  }
  return std::nullopt;
}

void Reach::note(const LaunchPlan& plan, int32_t kernel, const Problem& problem) {
  const Pass pass = rows_[kernel].pass;
  if (blocks_of(pass, plan) > 0) ++launches_[{kernel, variant_of(pass, plan, problem)}];
}

std::string Reach::aimed() const {
  if (!aimed_) return "no kernel";
  return text_of(rows_[aimed_->first]) + ": " + kVariantNames[static_cast<int>(aimed_->second)];
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
