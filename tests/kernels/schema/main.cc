// Prints the tables of core/schema.h, one line per entry: an array with its dimensions in each layout, a pass
// with its arrays, for each view of a Problem the distance in bytes between two slices of a leading
// dimension, and what launch_slices() launches.
#include <iostream>

#include "cuda/leading_slices.h"

using namespace jax_flash;

namespace {

uint8_t memory[1 << 16];

void print_launch(const char* what, const Problem& slice, const LaunchPlan& plan) {
  std::cout << "launch " << what << " " << slice.query.as<uint8_t>() - memory << " " << slice.leading.count()
            << " " << plan.keys.blocks << "\n";
}

}  // namespace

cudaError_t jax_flash::launch_schedules(const Problem& p, const LaunchPlan& plan, void*, cudaStream_t) {
  print_launch("schedules", p, plan);
  return cudaSuccess;
}

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

void print_launches(const Leading& leading) {
  Problem p{};
  p.dtype = DType::kBF16;
  p.leading = leading;
  p.query = {.data = memory, .leading = {100, 10}};
  LaunchPlan plan{};
  plan.keys.blocks = 30;
  const auto launch = [&](const Problem& slice, const LaunchPlan& of_slice) {
    print_launch("kernel", slice, of_slice);
    return cudaSuccess;
  };
  launch_slices(p, plan, &LaunchPlan::keys, nullptr, nullptr, launch);
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
  print_launches({1, {5}});
  print_launches({2, {3, 5}});
}
