// Only plans the calls, for a GPU that need not be there: JAX_FLASH_GUARD_CARD is the compute capability. All
// rows of csrc/kernels.def that it can run count as built, and every one of their kernels must be reached.
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "backend.h"
#include "core/table.h"
#include "reach.h"

namespace jax_flash::backend {
namespace {

// Shared memory that a CTA may have, and SMs, of a card of each generation.
constexpr Device kCards[] = {{75, 40, 65536}, {80, 108, 166912}, {86, 84, 101376}, {90, 132, 232448}};

Device card() {
  const char* name = std::getenv("JAX_FLASH_GUARD_CARD");
  for (const Device& one : kCards) {
    if (one.capability == std::atoi(name ? name : "90")) return one;
  }
  throw std::runtime_error("JAX_FLASH_GUARD_CARD is not 75, 80, 86 or 90");
}

// The rows that cmake/kernels.cmake builds: one for each dtype and, except for decode, for each loader.
std::vector<KernelRow> built_rows() {
  using columns::float32, columns::half;
  constexpr uint32_t kQueryElements = half | float32;
  std::vector<KernelRow> rows;
  for (const KernelRow& row : kernel_table()) {
    if (!row.arch->covers(card().capability)) continue;
    for (DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
      for (Loader loader : {Loader::kDense, Loader::kPaged}) {
        KernelRow one = row;
        one.elements = (row.elements & ~kQueryElements) | 1u << static_cast<int32_t>(dtype);
        if (row.pass != Pass::kDecode) one.loaders = 1u << static_cast<int32_t>(loader);
        const bool first = row.pass != Pass::kDecode || loader == Loader::kDense;
        if (row.takes(dtype) && (row.takes(loader) || row.pass == Pass::kDecode) && first)
          rows.push_back(one);
      }
    }
  }
  return rows;
}

Reach& reach() {
  static const std::vector<KernelRow> rows = built_rows();
  static Reach all(rows, card());
  return all;
}

}  // namespace

std::string name() { return "plans for sm_" + std::to_string(card().capability); }

bool sparing() { return false; }

int32_t width(int32_t any) { return (any + 7) / 8 * 8; }

bool repeatable(const AttentionSpec&, Pass) { return true; }

std::optional<Aim> aim(int64_t turn, Loader loader, std::initializer_list<Pass> passes) {
  return reach().aim(turn, loader, passes);
}

bool takes(const Problem& problem) { return reach().takes(problem); }

Problem example() { return reach().example(); }

std::string aimed() { return reach().aimed(); }

bool computes() { return false; }

bool run(Pass pass, const Problem& problem, const ThreadPool&, const Tangents*) {
  const LaunchPlan plan = reach().plan(pass, problem);
  for (int32_t kernel : {plan.decode_kernel, plan.kernel}) {
    if (kernel >= 0) reach().note(plan, kernel, problem);
  }
  return plan.kernel >= 0;
}

bool append(const AppendProblem&, const ThreadPool&) { return false; }

std::string summary() {
  const std::string report = reach().report();
  if (!reach().had_all_turns()) throw std::runtime_error(report + ", too few: more calls are needed");
  return report.substr(report.rfind('\n') + 1);  // the last line, without the counts of the rows
}

}  // namespace jax_flash::backend
