// Counters by which items that run side by side keep an order.
#pragma once

#include <cstdint>

#include "../core/spec.h"

namespace jax_flash {

// Returns when the counter has reached `value`, or once `abandoned` is set.
void wait_until(const int32_t* counter, int32_t value, const int32_t* abandoned);

// One counter for each of a row of tiles.
struct Progress {
  int32_t* counters = nullptr;
  const int32_t* abandoned = nullptr;

  JF_HD void await(int32_t tile, int32_t value) const {
    if (__atomic_load_n(counters + tile, __ATOMIC_ACQUIRE) < value) {
      wait_until(counters + tile, value, abandoned);
    }
  }
  JF_HD void reach(int32_t tile, int32_t value) const {
    __atomic_store_n(counters + tile, value, __ATOMIC_RELEASE);
  }
};

}  // namespace jax_flash
