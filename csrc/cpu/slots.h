// Memory that the units in progress take in turn: unit u has slot u % count once unit u - count is done.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "progress.h"

namespace jax_flash {

class Slots {
 public:
  // Each with `floats` of the memory and as many counters, 0 at first.
  Slots(int64_t count, int64_t floats, int64_t counters, float* memory, const int32_t* abandoned)
      : count_(count), floats_(floats), per_slot_(counters), memory_(memory), abandoned_(abandoned) {
    counters_.assign(count * counters, 0);
    served_.assign(count, 0);
    finished_.assign(count, 0);
  }

  // Waits for the unit's slot. Those that are waited for must come before it in the order of claiming.
  float* enter(int64_t unit) const {
    wait_until(&served_[unit % count_], static_cast<int32_t>(unit / count_), abandoned_);
    return memory_ + unit % count_ * floats_;
  }

  Progress progress(int64_t unit) { return {counters_.data() + unit % count_ * per_slot_, abandoned_}; }

  // One of the unit's `items` is done.
  void leave(int64_t unit, int32_t items) {
    const int64_t slot = unit % count_;
    if (__atomic_add_fetch(&finished_[slot], 1, __ATOMIC_ACQ_REL) < items) return;
    finished_[slot] = 0;
    std::fill_n(counters_.begin() + slot * per_slot_, per_slot_, 0);
    __atomic_store_n(&served_[slot], static_cast<int32_t>(unit / count_ + 1), __ATOMIC_RELEASE);
  }

 private:
  int64_t count_, floats_, per_slot_;
  float* memory_;
  const int32_t* abandoned_;
  std::vector<int32_t> counters_, served_,
      finished_;  // the last two: units that a slot had, items of its unit
};

}  // namespace jax_flash
