// Rows and plans in words: what `python -m jax_flash plan` prints and errors name.
#pragma once

#include <string>

#include "core/plan/launch_plan.h"

namespace jax_flash {

std::string text_of(const KernelRow& row);
std::string text_of(const LaunchPlan& plan, const KernelRow& row);

}  // namespace jax_flash
