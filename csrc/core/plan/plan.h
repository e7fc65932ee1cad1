// Which kernel runs a call, and how: a pure function of spec, sizes and device, tested without a GPU.
#pragma once

#include <span>
#include <string>

#include "core/plan/call.h"
#include "core/plan/dim.h"
#include "core/plan/launch_plan.h"

namespace jax_flash {

// A plan, or the reason why no kernel runs the call. The error is not a member of LaunchPlan, because then
// every kernel's source would include <string>, which takes half a second to compile.
struct PlannedCall : LaunchPlan {
  std::string error;
};

PlannedCall plan(const Call& call, std::span<const KernelRow> built);

// Bytes of workspace that are enough for a call on every device and with every row. A program allocates them
// when it is lowered, before its device is known.
Dim workspace_bound(Pass pass, const AttentionSpec& spec, const DimShapes& shapes);

}  // namespace jax_flash
