#include "cuda_module.h"

#include <dlfcn.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "table.h"

namespace nb = nanobind;

namespace jax_flash {
namespace {

constexpr const char* kDTypeNames[] = {"float16", "bfloat16", "float32"};
constexpr const char* kPassNames[] = {"forward", "backward", "bias_gradient"};

struct Handler {
  const char* target;  // the custom call's name
  const char* symbol;  // in the library
};
constexpr Handler kHandlers[] = {{"jax_flash_forward", "JaxFlashForwardCuda"},
                                 {"jax_flash_backward", "JaxFlashBackwardCuda"},
                                 {"jax_flash_bias_gradient", "JaxFlashBiasGradientCuda"},
                                 {"jax_flash_append", "JaxFlashAppendCuda"}};

std::vector<KernelRow>& built_kernels() {
  static std::vector<KernelRow> rows;
  return rows;
}

template <class Function>
Function* find(void* library, const char* name, const std::string& path) {
  void* symbol = dlsym(library, name);
  if (!symbol) throw std::runtime_error(path + " has no " + name + ": not a jax_flash CUDA library");
  return reinterpret_cast<Function*>(symbol);
}

// Opens the library for the life of the process; the handlers that it has, by custom-call name.
nb::dict load_cuda(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  const std::string version = find<VersionFunction>(library, "jax_flash_version", path)();
  if (version != JAX_FLASH_VERSION) {
    throw std::runtime_error(path + " is version " + version + ", jax_flash is " JAX_FLASH_VERSION);
  }
  int32_t count = 0;
  const KernelRow* rows = find<KernelsFunction>(library, "jax_flash_kernels", path)(&count);
  built_kernels().assign(rows, rows + count);
  nb::dict handlers;
  for (const Handler& handler : kHandlers) {
    if (void* symbol = dlsym(library, handler.symbol)) handlers[handler.target] = nb::capsule(symbol);
  }
  return handlers;
}

const char* name_of(Pass pass) {
  if (pass == Pass::kPagedForward) return "paged_forward";
  return pass == Pass::kDecode ? "decode" : kPassNames[static_cast<int>(pass)];
}

nb::tuple dtype_names(uint32_t dtypes) {
  nb::list names;
  for (int i = 0; i < 3; ++i) {
    if (dtypes >> i & 1) names.append(kDTypeNames[i]);
  }
  return nb::tuple(names);
}

bool same_kernel(const KernelRow& a, const KernelRow& b) {
  return std::string(a.family) == b.family && a.pass == b.pass && a.head_dim == b.head_dim &&
         a.value_dim == b.value_dim;
}

// The rows built, as (arch, pass, d, dv, dtypes): tile shapes and dtypes of one kernel merged.
nb::list cuda_kernels() {
  std::vector<KernelRow> merged;
  for (const KernelRow& row : built_kernels()) {
    const auto at =
        std::find_if(merged.begin(), merged.end(), [&](auto& other) { return same_kernel(row, other); });
    if (at == merged.end()) {
      merged.push_back(row);
    } else {
      at->dtypes |= row.dtypes;
    }
  }
  nb::list result;
  for (const KernelRow& row : merged) {
    result.append(
        nb::make_tuple(row.family, name_of(row.pass), row.head_dim, row.value_dim, dtype_names(row.dtypes)));
  }
  return result;
}

uint32_t built_dtypes(const KernelRow& row) {
  uint32_t dtypes = 0;
  for (const KernelRow& other : built_kernels()) {
    if (same_kernel(row, other) && row.block_m == other.block_m && row.block_n == other.block_n &&
        row.stages == other.stages) {
      dtypes |= other.dtypes & row.dtypes;
    }
  }
  return dtypes;
}

// Every row of csrc/kernels.def as a dictionary; "built" holds the dtypes that the loaded library has.
nb::list table() {
  nb::list result;
  for (const KernelRow& row : kernel_table()) {
    nb::dict entry;
    entry["arch"] = row.family;
    entry["pass"] = name_of(row.pass);
    entry["dtypes"] = dtype_names(row.dtypes);
    entry["d"] = row.head_dim;
    entry["dv"] = row.value_dim;
    entry["block_m"] = row.block_m;
    entry["block_n"] = row.block_n;
    entry["stages"] = row.stages;
    entry["warps"] = row.warps;
    entry["blocks"] = row.blocks;
    entry["built"] = dtype_names(built_dtypes(row));
    result.append(entry);
  }
  return result;
}

int index_of(const char* const (&names)[3], const std::string& name) {
  for (int i = 0; i < 3; ++i) {
    if (name == names[i]) return i;
  }
  throw std::invalid_argument("plan: " + name + " is not one of " + names[0] + ", " + names[1] + ", " +
                              names[2]);
}

nb::dict grid_of(const TileGrid& grid) {
  nb::dict result;
  result["block"] = grid.block;
  result["tiles"] = grid.tiles;
  result["blocks"] = grid.blocks;
  return result;
}

// The plan of a call on a described device, from the whole table: how plans are tested without a GPU.
nb::dict plan_of(const std::string& pass, const std::string& dtype, bool varlen, bool paged, bool float8,
                 int32_t num_splits, bool batch_invariant, int32_t operands, int32_t left, int32_t right,
                 float softcap, float scale, bool deterministic, int64_t leading, int64_t batch,
                 int64_t q_rows, int64_t k_rows, int64_t heads, int64_t kv_heads, int64_t d, int64_t dv,
                 int64_t page_size, const std::array<int64_t, 4>& bias, bool bias_in_tiles,
                 int32_t capability, int32_t sm_count, int32_t shared_memory) {
  AttentionSpec spec{};
  spec.layout = paged    ? varlen ? Layout::kPagedVarlen : Layout::kPaged
                : varlen ? Layout::kVarlen
                         : Layout::kFixed;
  spec.left = left;
  spec.right = right;
  spec.scale = scale;
  spec.softcap = softcap;
  spec.deterministic = deterministic;
  spec.operands = operands;
  spec.num_splits = num_splits;
  spec.batch_invariant = batch_invariant;
  const DType type = static_cast<DType>(index_of(kDTypeNames, dtype));
  const Shapes shapes{type,
                      float8 ? DType::kF8E4M3 : type,
                      leading,
                      leading > 1,
                      batch,
                      heads,
                      kv_heads,
                      d,
                      dv,
                      q_rows,
                      k_rows,
                      page_size,
                      {bias[0], bias[1], bias[2], bias[3]},
                      bias_in_tiles};
  const auto rows = kernel_table();
  const Pass which = static_cast<Pass>(index_of(kPassNames, pass));
  const LaunchPlan chosen = plan(which, spec, shapes, Device{capability, sm_count, shared_memory}, rows);
  if (chosen.kernel < 0) throw std::runtime_error(chosen.error);
  nb::dict result;
  result["row"] = table()[chosen.kernel];
  result["general"] = chosen.general();
  result["queries"] = grid_of(chosen.queries);
  result["keys"] = grid_of(chosen.keys);
  nb::dict decode;
  decode["columns"] = chosen.decode.columns;
  decode["ranges"] = chosen.decode.ranges;
  decode["packed_rows"] = chosen.decode.packed_rows;
  result["decode"] = decode;
  result["shared"] = chosen.shared;
  result["workspace"] = chosen.workspace;
  result["workspace_bound"] = workspace_bound(which, spec, shapes);
  result["text"] = chosen.to_string(rows[chosen.kernel]);
  return result;
}

}  // namespace

void bind_cuda(nb::module_& module) {
  module.def("load_cuda", &load_cuda, nb::arg("path"));
  module.def("cuda_kernels", &cuda_kernels);
  module.def("kernel_table", &table);
  module.def("plan", &plan_of, nb::kw_only(), nb::arg("pass_"), nb::arg("dtype"), nb::arg("varlen") = false,
             nb::arg("paged") = false, nb::arg("float8") = false, nb::arg("num_splits") = 0,
             nb::arg("batch_invariant") = false, nb::arg("operands") = 0, nb::arg("left") = kUnlimited,
             nb::arg("right") = kUnlimited, nb::arg("softcap") = 0.0f, nb::arg("scale") = 1.0f,
             nb::arg("deterministic") = false, nb::arg("leading") = 1, nb::arg("batch"), nb::arg("q_rows"),
             nb::arg("k_rows"), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("d"), nb::arg("dv"),
             nb::arg("page_size") = 0, nb::arg("bias") = std::array<int64_t, 4>{1, 1, 1, 1},
             nb::arg("bias_in_tiles") = false, nb::arg("capability"), nb::arg("sm_count"),
             nb::arg("shared_memory"));
}

}  // namespace jax_flash
