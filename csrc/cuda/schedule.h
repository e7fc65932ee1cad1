// What kernels know about the schedule of packed sequences (schedule.cu).
#pragma once

#include <cstdint>

namespace jax_flash {

// The most sequences that are sorted. Their slots come first; those after an empty one are empty, too.
inline constexpr int32_t kMostSorted = 510;

}  // namespace jax_flash
