// Counters that order work items which run concurrently.
#pragma once

#include <cstdint>

#include "../core/spec.h"

namespace jax_flash {

// Returns once the counter is at least `value`, or once `abandoned` is set because a thread has thrown.
void wait_until(const int32_t* counter, int32_t value, const int32_t* abandoned);

// One counter per tile.
struct Progress {
  int32_t* counters = nullptr;
  const int32_t* abandoned = nullptr;

  JF_HD void wait(int32_t tile, int32_t value) const {
    if (__atomic_load_n(counters + tile, __ATOMIC_ACQUIRE) < value) {
      wait_until(counters + tile, value, abandoned);
    }
  }
  JF_HD void signal(int32_t tile, int32_t value) const {
    __atomic_store_n(counters + tile, value, __ATOMIC_RELEASE);
  }
};

}  // namespace jax_flash
