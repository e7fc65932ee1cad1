// Prints the tables of core/schema.h, one line per entry: an array with its dimensions in each layout, a pass
// with its arrays, and for each view of a Problem the distance in bytes between two slices of a leading
// dimension.
#include <iostream>

#include "cuda/leading_slices.h"

using namespace jax_flash;

namespace {

template <class Row>
void print_array(const Row& array) {
  std::cout << "array " << array.name;
  for (const schema::Dims& dims : array.dims) {
    std::cout << " |";
    for (int32_t i = 0; i < dims.rank; ++i) {
      std::cout << " " << dims.axes[i].name << (dims.axes[i].may_be_one ? "*" : "");
    }
  }
  std::cout << "\n";
}

template <class Row>
void print_pass(const char* name, const schema::CallArrays<Row>& arrays) {
  std::cout << "pass " << name << " |";
  for (int32_t i = 0; i < arrays.operand_count; ++i) std::cout << " " << arrays.operands[i]->name;
  std::cout << " |";
  for (int32_t i = 0; i < arrays.result_count; ++i) std::cout << " " << arrays.results[i]->name;
  std::cout << "\n";
}

void print_slices() {
  static uint8_t memory[1 << 16];
  Problem p{};
  p.dtype = DType::kBF16, p.kv_dtype = DType::kF8E4M3, p.bias_dtype = DType::kF32;
  p.leading = {2, {3, 5}};
  const View view{.data = memory, .leading = {1000, 7}};
#define JF_REQUIRED(name, ...) p.name = view;
#define JF_OPTIONAL(id, name, ...) p.name = view;
#include "operands.def"
#define JF_RESULT(name, ...) p.name = view;
#define JF_LIKE(name, ...) p.name = view;
#include "results.def"
  const Problem slice = leading_slice(p, 1);
  const auto print = [&](const char* name, const View& of) {
    std::cout << "slice " << name << " " << (of.as<uint8_t>() - memory) / 1000.0 << " " << of.leading[0]
              << "\n";
  };
#define JF_REQUIRED(name, ...) print(#name, slice.name);
#define JF_OPTIONAL(id, name, ...) print(#name, slice.name);
#include "operands.def"
#define JF_RESULT(name, ...) print(#name, slice.name);
#define JF_LIKE(name, ...) print(#name, slice.name);
#include "results.def"
}

}  // namespace

int main() {
  for (const schema::Array& array : schema::kOwn) print_array(array);
  for (const schema::Array& array : schema::kLike) print_array(array);
  for (const schema::AppendArray& array : schema::kAppendRequired) print_array(array);
  for (const schema::AppendArray& array : schema::kAppendOptional) print_array(array);
#define JF_PASS(id, name, ...) print_pass(#name, schema::arrays_of(Pass::k##id));
#define JF_APPEND_PASS(id, name, ...) print_pass(#name, schema::k##id);
#include "results.def"
  print_slices();
}
