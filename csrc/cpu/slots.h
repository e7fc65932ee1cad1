// Memory for a limited number of units in progress. Unit u uses slot u % count, after unit u - count has
// released it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "progress.h"

namespace jax_flash {

class Slots {
 public:
  // Each slot has `floats` of the memory and `counters` progress counters, which start at 0.
  Slots(int64_t count, int64_t floats, int64_t counters, float* memory, const int32_t* abandoned)
      : count_(count), floats_(floats), per_slot_(counters), memory_(memory), abandoned_(abandoned) {
    counters_.assign(count * counters, 0);
    released_.assign(count, 0);
    finished_.assign(count, 0);
  }

  // Waits until the unit's slot is free. To avoid deadlock, the units that it waits for must be claimed
  // before it.
  float* acquire(int64_t unit) const {
    wait_until(&released_[unit % count_], static_cast<int32_t>(unit / count_), abandoned_);
    return memory_ + unit % count_ * floats_;
  }

  Progress progress(int64_t unit) { return {counters_.data() + unit % count_ * per_slot_, abandoned_}; }

  // Called when one of the unit's `items` is done; the last call frees the slot.
  void release(int64_t unit, int32_t items) {
    const int64_t slot = unit % count_;
    if (__atomic_add_fetch(&finished_[slot], 1, __ATOMIC_ACQ_REL) < items) return;
    finished_[slot] = 0;
    std::fill_n(counters_.begin() + slot * per_slot_, per_slot_, 0);
    __atomic_store_n(&released_[slot], static_cast<int32_t>(unit / count_ + 1), __ATOMIC_RELEASE);
  }

 private:
  int64_t count_, floats_, per_slot_;
  float* memory_;
  const int32_t* abandoned_;
  std::vector<int32_t> counters_;
  // Per slot: the units that have released it, and the finished items of its unit.
  std::vector<int32_t> released_, finished_;
};

}  // namespace jax_flash
