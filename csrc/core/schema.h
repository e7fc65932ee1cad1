// csrc/operands.def and csrc/results.def as constexpr tables, so that an error in a row does not compile.
#pragma once

#include <cstddef>
#include <cstdint>

#include "problem.h"

namespace jax_flash {

// Element types. In one call all arrays of kActivation have one dtype, which the first of them decides; the
// same holds for kBias and kPool.
enum class Element : int32_t { kActivation, kBias, kPool, kFloat32, kInt32, kUInt32, kBoolean };

// Bytes of an element of a call's array.
inline int64_t element_bytes(const Problem& p, Element element) {
  switch (element) {
    case Element::kActivation:
      return size_of(p.dtype);
    case Element::kBias:
      return size_of(p.bias_dtype);
    case Element::kPool:
      return size_of(p.kv_dtype);
    case Element::kBoolean:
      return 1;
    default:
      return 4;
  }
}

namespace schema {

inline constexpr Element activation = Element::kActivation, bias = Element::kBias, pool = Element::kPool,
                         float32 = Element::kFloat32, int32 = Element::kInt32, uint32 = Element::kUInt32,
                         boolean = Element::kBoolean;

constexpr bool same_word(const char* a, const char* b) {
  const auto ends = [](char c) { return c == 0 || c == ' ' || c == '*'; };
  for (; *a == *b && !ends(*a); ++a, ++b) {
  }
  return ends(*a) && ends(*b);
}

// An alias, because nvcc writes parentheses around a pointer to a member, for which GCC warns.
using SizeOf = int64_t Sizes<int64_t>::*;
using StrideOf = int64_t View::*;
using ViewOf = View Problem::*;
using TangentOf = View Tangents::*;
using AppendViewOf = View AppendProblem::*;

// One dimension of an array.
struct Axis {
  const char* name = nullptr;
  SizeOf size = nullptr;  // null: always `more`
  int32_t more = 0;       // the dimension minus the size
  StrideOf stride = nullptr;
  bool may_be_one = false;
};

inline constexpr Axis kAxes[] = {
#define JF_DIM(name, size, more, stride) {#name, &Sizes<int64_t>::size, more, &View::stride},
#define JF_CONSTANT_DIM(name, size, stride) {#name, nullptr, size, &View::stride},
#include "../operands.def"
};

constexpr Axis axis_of(const char* name) {
  for (const Axis& axis : kAxes) {
    if (same_word(axis.name, name)) return axis;
  }
  throw "csrc/operands.def: no such dimension";
}

// The dimensions of an array in one layout, in its order.
struct Dims {
  static constexpr int32_t kMost = 4;
  Axis axes[kMost];
  int32_t rank = 0;

  constexpr Dims() = default;
  constexpr Dims(const char* names) {
    while (*names) {
      if (rank == kMost) throw "csrc/operands.def: too many dimensions";
      Axis& axis = axes[rank++] = axis_of(names);
      while (*names && *names != ' ') axis.may_be_one = *names++ == '*';
      while (*names == ' ') ++names;
    }
  }

  constexpr bool of_pool() const { return rank == kMost && same_word(axes[0].name, "p"); }
};

// A row of the tables. Its view is a member of Problem or, in the tangent pass, of Tangents; the other
// pointer is null.
struct Array {
  const char* name;
  Element element;
  Dims dims[4];  // by Layout
  ViewOf view = nullptr;
  TangentOf tangent = nullptr;
};

inline constexpr Array kOwn[] = {
#define JF_REQUIRED(name, element, derivative, ...) {#name, element, {__VA_ARGS__}, &Problem::name},
#define JF_OPTIONAL(id, name, element, derivative, ...) {#name, element, {__VA_ARGS__}, &Problem::name},
#include "../operands.def"
#define JF_RESULT(name, element, ...) {#name, element, {__VA_ARGS__}, &Problem::name},
#include "../results.def"
};

template <size_t kCount>
constexpr const Array& find(const Array (&arrays)[kCount], const char* name) {
  for (const Array& array : arrays) {
    if (same_word(array.name, name)) return array;
  }
  throw "csrc/results.def: no such array";
}

constexpr Array like(const char* name, const char* other, ViewOf view, TangentOf tangent) {
  Array array = find(kOwn, other);
  array.name = name, array.view = view, array.tangent = tangent;
  return array;
}

// Arrays that have the dims of another array.
inline constexpr Array kLike[] = {
#define JF_OPTIONAL_TANGENT(id, name, other) like(#name, #other, nullptr, &Tangents::name),
#include "../operands.def"
#define JF_LIKE(name, other) like(#name, #other, &Problem::name, nullptr),
#define JF_TANGENT(name, other) like(#name, #other, nullptr, &Tangents::name),
#include "../results.def"
};

constexpr const Array& array_of(const char* name) {
  for (const Array& array : kLike) {
    if (same_word(array.name, name)) return array;
  }
  return find(kOwn, name);
}

// The optional operands, indexed by Operand.
inline constexpr const Array* kOptional[] = {
#define JF_OPTIONAL(id, name, ...) &array_of(#name),
#define JF_OPTIONAL_TANGENT(id, name, other) &array_of(#name),
#include "../operands.def"
};

// An array of append_kv.
struct AppendArray {
  const char* name;
  Element element;
  Dims dims[2];  // without and with cu_seqlens
  AppendViewOf view;
};

inline constexpr AppendArray kAppendRequired[] = {
#define JF_APPEND_REQUIRED(name, element, ...) {#name, element, {__VA_ARGS__}, &AppendProblem::name},
#include "../operands.def"
};

// The optional operands of append_kv, indexed by AppendOperand.
inline constexpr AppendArray kAppendOptional[] = {
#define JF_APPEND_OPTIONAL(id, name, element, ...) {#name, element, {__VA_ARGS__}, &AppendProblem::name},
#include "../operands.def"
};

// The names in a list, such as "query key value".
template <class Use>
constexpr void for_each_word(const char* names, Use use) {
  while (*names) {
    use(names);
    while (*names && *names != ' ') ++names;
    while (*names == ' ') ++names;
  }
}

// The required operands and the results of a custom call.
template <class Row>
struct CallArrays {
  static constexpr int32_t kMost = 8;
  const Row* operands[kMost] = {};
  const Row* results[kMost] = {};
  int32_t operand_count = 0, result_count = 0;

  template <class Find>
  constexpr CallArrays(const char* operand_names, const char* result_names, Find find) {
    for_each_word(operand_names, [&](const char* name) { operands[operand_count++] = &find(name); });
    for_each_word(result_names, [&](const char* name) { results[result_count++] = &find(name); });
  }
};

#define JF_PASS(id, name, operands, results) \
  inline constexpr CallArrays<Array> k##id{operands, results, array_of};
#include "../results.def"

// Decode is no custom call, because its kernels run within the forward. Append's custom calls have their own
// tables.
constexpr const CallArrays<Array>& arrays_of(Pass pass) {
  switch (pass) {
#define JF_PASS(id, ...) \
  case Pass::k##id:      \
    return k##id;
#include "../results.def"
    case Pass::kDecode:
    case Pass::kAppend:
      break;
  }
  return kForward;
}

// Whether a call returns this result of its pass.
constexpr bool is_result(const Array& result, const AttentionSpec& spec) {
  if (result.view == &Problem::dvalue) return !spec.shared_kv();
  return result.view != &Problem::row_max || spec.row_max;
}

// The number of results of a call.
constexpr int32_t count_results(Pass pass, const AttentionSpec& spec) {
  const auto& arrays = arrays_of(pass);
  int32_t count = 0;
  for (int32_t i = 0; i < arrays.result_count; ++i) count += is_result(*arrays.results[i], spec);
  return count;
}

constexpr const AppendArray& append_array_of(const char* name) {
  for (const AppendArray& array : kAppendRequired) {
    if (same_word(array.name, name)) return array;
  }
  for (const AppendArray& array : kAppendOptional) {
    if (same_word(array.name, name)) return array;
  }
  throw "csrc/results.def: no such array of append_kv";
}

#define JF_APPEND_PASS(id, name, operands, results) \
  inline constexpr CallArrays<AppendArray> k##id{operands, results, append_array_of};
#include "../results.def"

}  // namespace schema
}  // namespace jax_flash
