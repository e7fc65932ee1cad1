// csrc/cuda/ptx/barrier.cuh on the emulator.
#pragma once

#include "emulator.h"

namespace jax_flash::ptx {

inline constexpr int kBarrierBytes = 8;

struct EmulatedBarrier {
  uint16_t count, arrived;
  uint32_t phase;
};
inline EmulatedBarrier& emulated_barrier(uint32_t barrier) {
  return *reinterpret_cast<EmulatedBarrier*>(emulator::shared + barrier);
}

inline void barrier_init(uint32_t barrier, uint32_t count) {
  emulated_barrier(barrier) = {static_cast<uint16_t>(count), 0, 0};
}
inline void barrier_arrive(uint32_t barrier) {
  EmulatedBarrier& b = emulated_barrier(barrier);
  if (++b.arrived == b.count) b.arrived = 0, ++b.phase;
}
inline void barrier_arrive_after_copies(uint32_t barrier) {
  emulator::commit_copies();
  emulator::wait_copies(0);
  barrier_arrive(barrier);
}
inline constexpr uint32_t kWarpArrivals = 1;
inline void barrier_arrive_by_warp(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}
inline void barrier_wait(uint32_t barrier, uint32_t phase) {
  const EmulatedBarrier& b = emulated_barrier(barrier);
  emulator::wait_until([&] { return (b.phase & 1) != (phase & 1); });
}
inline int thread_index() { return static_cast<int>(threadIdx.x); }
inline uint32_t lane_index() { return threadIdx.x % 32; }
inline void sync_group(int number, int threads) { emulator::group_barrier(number, threads); }

}  // namespace jax_flash::ptx
