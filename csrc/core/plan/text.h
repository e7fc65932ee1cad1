// Text for rows and plans, for `python -m jax_flash plan` and error messages.
#pragma once

#include <string>

#include "core/plan/launch_plan.h"

namespace jax_flash {

std::string text_of(const KernelRow& row);
std::string text_of(const LaunchPlan& plan, const KernelRow& row);

}  // namespace jax_flash
