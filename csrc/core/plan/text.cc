// Rows and plans in words: what `python -m jax_flash plan` prints and errors name.
#include <string>

#include "core/plan/launch_plan.h"

namespace jax_flash {

const char* name_of(Pass pass) {
  constexpr const char* kNames[] = {"forward", "backward", "bias_gradient", "decode", "tangent"};
  return kNames[static_cast<int>(pass)];
}

const char* name_of(Loader loader) { return loader == Loader::kPaged ? "paged" : "dense"; }

const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2"};
  return kNames[static_cast<int>(dtype)];
}

const char* name_of(ScoreKind kind) {
  constexpr const char* kNames[] = {"plain", "general", "general", "dropout", "segments",
                                    "alibi", "softcap", "bias",    "mask"};
  return kNames[static_cast<int>(kind)];
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

std::string KernelRow::to_string() const {
  std::string text = std::string(arch->name) + " " + name_of(pass) + " " + loaders_of(*this);
  for (DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
    if (takes(dtype)) text += std::string(" ") + name_of(dtype);
  }
  return text + " " + shape_of(*this) + " stages " + std::to_string(stages) + " warps " +
         std::to_string(warps) + " teams " + std::to_string(teams);
}

std::string LaunchPlan::to_string(const KernelRow& row) const {
  std::string text = std::string(row.arch->name) + " " + name_of(row.pass) + " " + loaders_of(row) + " " +
                     name_of(score) + " " + shape_of(row);
  if (decode.columns) {
    text += std::string(", decode splits ") + count(decode.columns, "columns") + " over " +
            count(decode.ranges, "CTAs each");
    if (decode.packed_rows) text += " (sequences of at most " + count(decode.packed_rows, "rows)");
  }
  if (queries.blocks) text += ", " + count(queries.blocks, "query tiles");
  if (persistent_ctas) text += " on " + count(persistent_ctas, "persistent CTAs");
  if (cluster_size > 1) text += " in " + std::to_string(cluster_size) + "-CTA clusters";
  if (row.teams > 1) text += " of " + count(row.teams, "teams");
  if (keys.blocks) text += ", " + count(keys.blocks, "key tiles");
  return text + ", " + count(shared, "bytes of shared memory") + ", " +
         count(workspace, "bytes of workspace");
}

}  // namespace jax_flash
