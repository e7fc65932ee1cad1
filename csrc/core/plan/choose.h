// Which row of csrc/kernels.def runs a call.
#pragma once

#include <span>
#include <string>

#include "core/plan/family.h"

namespace jax_flash {

// The traits of the row's family for its pass.
const PassTraits& traits_of(const KernelRow& row);

// Finds the kernel of a row that runs the call: the one for its only option, or else the one for every
// combination. Returns false if the row has neither.
bool find_score(const KernelRow& row, const Call& call, ScoreKind& found);

// The best row of a pass; null if no row runs the call.
const KernelRow* choose(Pass pass, const Call& call, std::span<const KernelRow> built);

// The error message for a call that no row runs; it names the rows of this pass and dtype that were built.
std::string no_kernel(const Call& call, std::span<const KernelRow> built);

}  // namespace jax_flash
