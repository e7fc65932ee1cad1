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

  // The row that calls must take; -1: the plan chooses.
  int32_t aimed() const { return aimed_; }
  bool wants_clusters() const { return variant_ == Variant::kCluster; }

  // Counts a launch of plan.kernel or plan.decode_kernel.
  void note(const LaunchPlan& plan, int32_t kernel, const Problem& problem);

  // Prints a line for every row with the launches of each of its kernels; throws where a kernel had its turn
  // but was not reached.
  std::string report() const;

 private:
  using Kernel = std::pair<int32_t, Variant>;  // a row, and which of its kernels

  std::span<const KernelRow> rows_;
  Device device_;
  int32_t aimed_ = -1;
  Variant variant_ = Variant::kPlain;  // of the row aimed at
  std::vector<Kernel> kernels_;        // of the driver's passes, by their turns
  std::set<Kernel> had_turn_;
  std::map<Kernel, int64_t> launches_;
};

}  // namespace jax_flash::backend
