// Text for rows and plans, for `python -m jax_flash plan` and error messages.
#include "core/plan/text.h"

namespace jax_flash {

const char* name_of(Pass pass) {
  constexpr const char* kNames[] = {"forward", "backward", "bias_gradient", "decode", "tangent", "append"};
  return kNames[static_cast<int>(pass)];
}

const char* name_of(Loader loader) { return loader == Loader::kPaged ? "paged" : "dense"; }

const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2"};
  return kNames[static_cast<int>(dtype)];
}

const char* name_of(ScoreKind kind) {
  constexpr const char* kNames[] = {
#define JF_SCORE(kind, name, printed, ...) #printed,
#include "../../scores.def"
  };
  return kNames[static_cast<int>(kind)];
}

const char* name_of(Design design) {
  constexpr const char* kNames[] = {"tiles",           "one_tile", "packed_heads", "split_keys", "cluster",
                                    "cluster_columns", "latent",   "latent_few",   "tokens",     "bulk",
                                    "dynamic"};
  return kNames[static_cast<int>(design)];
}

namespace {

std::string loaders_of(const KernelRow& row) {
  std::string text;
  for (Loader loader : {Loader::kDense, Loader::kPaged}) {
    if (row.takes(loader)) text += std::string(text.empty() ? "" : "|") + name_of(loader);
  }
  return text;
}

std::string shape_of(const KernelRow& row) {
  return "d=" + std::to_string(row.head_dim) + " dv=" + std::to_string(row.value_dim) + " tile " +
         std::to_string(row.block_m) + "x" + std::to_string(row.block_n);
}

std::string count(int64_t n, const char* what) { return std::to_string(n) + " " + what; }

}  // namespace

std::string text_of(const KernelRow& row) {
  std::string text = std::string(row.arch->name) + " " + name_of(row.pass) + " " + loaders_of(row);
  for (DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
    if (row.takes(dtype)) text += std::string(" ") + name_of(dtype);
  }
  return text + " " + shape_of(row) + " stages " + std::to_string(row.stages) + " warps " +
         std::to_string(row.warps) + " teams " + std::to_string(row.teams);
}

std::string text_of(const LaunchPlan& plan, const KernelRow& row) {
  std::string text = std::string(row.arch->name) + " " + name_of(row.pass) + " " + loaders_of(row) + " " +
                     name_of(plan.score) + " " + shape_of(row);
  if (plan.decode.columns) {
    text += std::string(", decode splits ") + count(plan.decode.columns, "columns") + " over " +
            count(plan.decode.ranges, "CTAs each");
    if (plan.decode.packed_rows) text += " (sequences of at most " + count(plan.decode.packed_rows, "rows)");
  }
  if (plan.queries.blocks) text += ", " + count(plan.queries.blocks, "query tiles");
  if (plan.persistent_ctas) text += " on " + count(plan.persistent_ctas, "persistent CTAs");
  if (plan.cluster_size > 1) text += " in " + std::to_string(plan.cluster_size) + "-CTA clusters";
  if (row.teams > 1) text += " of " + count(row.teams, "teams");
  if (plan.keys.blocks) text += ", " + count(plan.keys.blocks, "key tiles");
  if (plan.parts > 1) text += ", each in " + count(plan.parts, "parts");
  return text + ", " + count(plan.shared, "bytes of shared memory") + ", " +
         count(plan.workspace, "bytes of workspace");
}

}  // namespace jax_flash
