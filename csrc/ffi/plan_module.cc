// The kernel table and plans, for Python: support matrix, workspace sizes, `python -m jax_flash plan` and
// tests that need no GPU.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>

#include <array>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/plan/plan.h"
#include "core/plan/text.h"
#include "core/plan/workspace.h"
#include "core/table.h"
#include "cuda_module.h"

namespace nb = nanobind;

namespace jax_flash {
namespace {

constexpr Pass kPasses[] = {Pass::kForward, Pass::kBackward, Pass::kBiasGradient, Pass::kTangent};
constexpr DType kDTypes[] = {DType::kF16, DType::kBF16, DType::kF32};
constexpr Loader kLoaders[] = {Loader::kDense, Loader::kPaged};
constexpr ScoreKind kScores[] = {
#define JF_SCORE(kind, ...) ScoreKind::k##kind,
#include "../scores.def"
};

template <class Enum, size_t kCount>
nb::tuple names_of(const Enum (&values)[kCount], uint32_t set) {
  nb::list names;
  for (Enum value : values) {
    if (set >> static_cast<int32_t>(value) & 1) names.append(name_of(value));
  }
  return nb::tuple(names);
}

template <class Enum, size_t kCount>
Enum by_name(const Enum (&values)[kCount], const std::string& name) {
  std::string known;
  for (Enum value : values) {
    if (name == name_of(value)) return value;
    known += std::string(known.empty() ? "" : ", ") + name_of(value);
  }
  throw std::invalid_argument("plan: " + name + " is not one of " + known);
}

// A symbolic size: an expression of jax.export's symbolic dimensions.
struct PythonSymbol final : Dim::Symbol {
  nb::object expression;
  explicit PythonSymbol(nb::object value) : expression(std::move(value)) {}
  Dim apply(Dim::Op op, const Dim& left, const Dim& right) const override;
};

nb::object to_python(const Dim& dim) {
  if (dim.known()) return nb::int_(dim.value());
  return static_cast<const PythonSymbol*>(dim.symbol())->expression;
}

Dim to_dim(nb::object value) {
  if (PyLong_Check(value.ptr())) return nb::cast<int64_t>(value);
  return Dim(std::make_shared<PythonSymbol>(std::move(value)));
}

Dim PythonSymbol::apply(Dim::Op op, const Dim& left, const Dim& right) const {
  const nb::object a = to_python(left), b = to_python(right);
  switch (op) {
    case Dim::Op::kAdd:
      return to_dim(a + b);
    case Dim::Op::kMultiply:
      return to_dim(a * b);
    case Dim::Op::kFloorDivide:
      return to_dim(a.floor_div(b));
    case Dim::Op::kMax:
      return to_dim(nb::module_::import_("jax.core").attr("max_dim")(a, b));
    case Dim::Op::kMin:
      return to_dim(nb::module_::import_("jax.core").attr("min_dim")(a, b));
  }
  return {};
}

// Keyword arguments. An argument that nothing has read is an error.
class Options {
 public:
  Options(const char* function, nb::dict given) : function_(function), given_(std::move(given)) {}

  template <class T>
  T get(const char* name) {
    known_.insert(name);
    if (!given_.contains(name)) throw nb::type_error((function_ + ": " + name + " is missing").c_str());
    return nb::cast<T>(given_[name]);
  }
  template <class T>
  T get(const char* name, T otherwise) {
    known_.insert(name);
    return given_.contains(name) ? nb::cast<T>(given_[name]) : otherwise;
  }
  void finish() const {
    for (auto [name, _] : given_) {
      const auto text = nb::cast<std::string>(name);
      if (!known_.contains(text)) throw nb::type_error((function_ + ": there is no option " + text).c_str());
    }
  }

 private:
  std::string function_;
  nb::dict given_;
  std::set<std::string> known_;
};

template <class T>
void read_field(Options& options, const char* name, T& field) {
  if constexpr (std::is_enum_v<T>) {
    field = static_cast<T>(options.get<int32_t>(name));
  } else {
    field = options.get<T>(name);
  }
}

// Reads the attributes of the custom call (AttentionSpec.plain_attributes in jax_flash/spec.py).
AttentionSpec spec_of(const nb::dict& given) {
  Options options("spec", given);
  AttentionSpec spec;
#define JF_READ(type, name) read_field(options, #name, spec.name);
  JF_ATTENTION_FIELDS(JF_READ)
#undef JF_READ
  options.finish();
  return spec;
}

template <class T>
T size_as(nb::object value) {
  if constexpr (std::is_same_v<T, Dim>) {
    return to_dim(std::move(value));
  } else {
    return nb::cast<T>(value);
  }
}

// The sizes of a call from a dictionary {name of a dimension in csrc/operands.def: its size}.
template <class T>
Sizes<T> sizes_of(const AttentionSpec& spec, const nb::dict& given) {
  Sizes<T> sizes;
#define JF_DIM(name, size, more, stride) \
  if (given.contains(#name)) sizes.size = size_as<T>(given[#name]) + T(-(more));
#include "../operands.def"
  if (spec.shared_kv()) sizes.value_dim = T(spec.value_dim);
  if (spec.paged() && given.contains("pages")) sizes.k_rows = sizes.table * sizes.page_size;
  return sizes;
}

Shapes shapes_of_options(const AttentionSpec& spec, Options& options) {
  Shapes s{};
  static_cast<Sizes<int64_t>&>(s) = sizes_of<int64_t>(spec, options.get<nb::dict>("sizes"));
  s.dtype = by_name(kDTypes, options.get<std::string>("dtype"));
  s.kv_dtype = options.get("float8", false) ? DType::kF8E4M3 : s.dtype;
  s.leading = options.get("leading", int64_t{1});
  s.leading_rank = options.get("leading_rank", int32_t{s.leading > 1});
  const auto bias = options.get("bias", std::array<int64_t, 4>{1, 1, 1, 1});
  std::copy(bias.begin(), bias.end(), s.bias);
  s.bias_in_tiles = options.get("bias_in_tiles", false);
  s.bias_in_chunks = options.get("bias_in_chunks", s.bias_in_tiles);
  s.mask_in_chunks = options.get("mask_in_chunks", false);
  s.float_bias = options.get("float_bias", false);
  const auto mask = options.get("mask", std::array<int64_t, 3>{});
  s.mask = {mask[0], mask[1], mask[2]};
  return s;
}

// A row of csrc/kernels.def as a dictionary; "built" holds the dtypes that the loaded library has.
nb::dict entry_of(const KernelRow& row) {
  nb::dict entry;
  entry["arch"] = row.arch->name;
  entry["pass"] = name_of(row.pass);
  entry["design"] = name_of(row.design);
  entry["loaders"] = names_of_loaders(row.loaders);
  entry["dtypes"] = names_of_dtypes(row.elements);
  entry["d"] = row.head_dim;
  entry["dv"] = row.value_dim;
  entry["block_m"] = row.block_m;
  entry["block_n"] = row.block_n;
  entry["stages"] = row.stages;
  entry["warps"] = row.warps;
  entry["teams"] = row.teams;
  entry["multicast"] = row.multicast;
  entry["blocks"] = row.blocks;
  entry["scores"] = names_of_scores(row.scores);
  entry["built"] = names_of_dtypes(built_dtypes(row));
  return entry;
}

nb::list table() {
  nb::list result;
  for (const KernelRow& row : kernel_table()) result.append(entry_of(row));
  return result;
}

nb::dict grid_of(const TileGrid& grid) {
  nb::dict result;
  result["block"] = grid.block;
  result["tiles"] = grid.tiles;
  result["blocks"] = grid.blocks;
  return result;
}

nb::dict decode_of(const DecodeGrid& grid) {
  nb::dict result;
  result["columns"] = grid.columns;
  result["ranges"] = grid.ranges;
  result["packed_rows"] = grid.packed_rows;
  return result;
}

// The plan of a call on a described device, from the whole table.
nb::dict plan_of(nb::kwargs given) {
  Options options("plan", given);
  const Pass pass = by_name(kPasses, options.get<std::string>("pass_"));
  const AttentionSpec spec = spec_of(options.get<nb::dict>("spec"));
  const Shapes shapes = shapes_of_options(spec, options);
  const Device device{options.get<int32_t>("capability"), options.get<int32_t>("sm_count"),
                      options.get<int32_t>("shared_memory")};
  options.finish();
  const auto rows = kernel_table();
  const PlannedCall chosen = plan({pass, spec, shapes, device}, rows);
  if (chosen.kernel < 0) throw std::runtime_error(chosen.error);
  nb::dict result;
  result["row"] = entry_of(rows[chosen.kernel]);
  result["score"] = name_of(chosen.score);
  result["general"] = chosen.general();
  result["queries"] = grid_of(chosen.queries);
  result["keys"] = grid_of(chosen.keys);
  result["decode"] = decode_of(chosen.decode);
  result["cluster_size"] = chosen.cluster_size;
  result["persistent_ctas"] = chosen.persistent_ctas;
  result["parts"] = chosen.parts;
  result["shared"] = chosen.shared;
  result["workspace"] = chosen.workspace;
  result["workspace_bound"] = to_python(workspace_bound(pass, spec, dims_of(shapes)));
  result["text"] = text_of(chosen, rows[chosen.kernel]);
  if (chosen.decode_kernel >= 0) result["decode_row"] = entry_of(rows[chosen.decode_kernel]);
  return result;
}

// Bytes of workspace; sizes may be symbolic. `mask`: MaskSizes.
nb::object bound_of(const std::string& pass, const nb::dict& attributes, const nb::dict& sizes,
                    nb::object leading, const std::array<nb::object, 3>& mask) {
  const AttentionSpec spec = spec_of(attributes);
  const DimShapes shapes{sizes_of<Dim>(spec, sizes),
                         to_dim(std::move(leading)),
                         {to_dim(mask[0]), to_dim(mask[1]), to_dim(mask[2])}};
  return to_python(workspace_bound(by_name(kPasses, pass), spec, shapes));
}

// Whether an arch's code runs on a device of a compute capability.
bool covers(const std::string& name, int32_t capability) {
  for (const Arch* arch : arch_table()) {
    if (name == arch->name) return arch->covers(capability);
  }
  return false;
}

}  // namespace

nb::tuple names_of_dtypes(uint32_t dtypes) { return names_of(kDTypes, dtypes); }
nb::tuple names_of_loaders(uint32_t loaders) { return names_of(kLoaders, loaders); }
nb::tuple names_of_scores(uint32_t scores) { return names_of(kScores, scores); }

void bind_plan(nb::module_& module) {
  module.def("kernel_table", &table);
  module.def("plan", &plan_of);
  module.def("workspace_bound", &bound_of, nb::arg("pass_"), nb::arg("spec"), nb::arg("sizes"),
             nb::arg("leading"), nb::arg("mask"));
  module.def("covers", &covers, nb::arg("arch"), nb::arg("capability"));
}

}  // namespace jax_flash
