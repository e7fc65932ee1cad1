// Which kernels of the library a driver has to reach, and which it has reached.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "backend.h"
#include "core/plan/plan.h"

namespace jax_flash::backend {

class Reach {
 public:
  Reach(std::span<const KernelRow> rows, const Device& device) : rows_(rows), device_(device) {}

  std::optional<Aim> aim(int64_t turn, Loader loader, std::initializer_list<Pass> passes);

  // The plan with the row that this turn targets, for a card of the row's family; without a target, the usual
  // plan. Its kernel indices are indices of all rows.
  LaunchPlan plan(Pass pass, const Problem& problem) const { return plan(aimed_, pass, problem); }

  // Whether the targeted kernel runs a call; sizes and options of a call that it runs; its name.
  bool takes(const Problem& problem) const { return takes(aimed_, problem); }
  Problem example() const { return *example(aimed_); }
  std::string aimed() const;

  // Counts a launch of plan.kernel or plan.decode_kernel.
  void note(const LaunchPlan& plan, int32_t kernel, const Problem& problem);

  // Prints a line for every row with the launches of each of its kernels; throws where a kernel had its turn
  // but was not reached.
  std::string report() const;
  bool had_all_turns() const { return had_turn_.size() == kernels_.size(); }

 private:
  using Kernel = std::pair<int32_t, Variant>;  // a row, and which of its kernels

  LaunchPlan plan(const std::optional<Kernel>& aimed, Pass pass, const Problem& problem) const;
  bool takes(const std::optional<Kernel>& aimed, const Problem& problem) const;
  std::optional<Problem> example(const std::optional<Kernel>& aimed) const;

  std::span<const KernelRow> rows_;
  Device device_;
  std::optional<Kernel> aimed_;  // none: the plan chooses freely
  std::vector<Kernel> kernels_;  // the kernels that turns target, in order
  std::set<Kernel> had_turn_;
  std::map<Kernel, int64_t> launches_;
};

}  // namespace jax_flash::backend
