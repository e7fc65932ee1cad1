// Warp specialisation of the sm_90a kernels: the role and the registers of each warpgroup.
//
// The warps of warpgroup 0 are producers. Each other warpgroup is a consumer, which owns the 64 rows of a
// wgmma. A CTA may run several teams, each with some of warpgroup 0's warps and its own consumers.
#pragma once

#include <cstdint>

#include "core/band.h"
#include "core/families/hopper_layout.h"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/registers.cuh"

namespace jax_flash {

inline constexpr int kWarpgroup = 128;  // threads
using hopper::kConsumerRows;
inline constexpr int kConsumerWarps = kWarpgroup / 32;

// Registers per thread after setmaxnreg, in a CTA with `consumers` consumer warpgroups. `widens`: another
// warpgroup, with a producer's registers, widens float8 tiles.
constexpr int consumer_registers(int consumers, bool widens = false) {
  return consumers <= 2 ? (widens ? 208 : 232) : consumers == 3 ? 160 : 112;
}
constexpr int producer_registers(int consumers, bool widens = false) {
  return widens ? 48 : consumers <= 2 ? 40 : 32;
}

// Whether the CTA is launched with enough registers for all warpgroups; else setmaxnreg would wait forever.
constexpr bool registers_suffice(int threads, int consumers, bool widens = false) {
  const int producers = 1 + widens;
  return kWarpgroup * (producers * producer_registers(consumers, widens) +
                       (threads / kWarpgroup - producers) * consumer_registers(consumers, widens)) <=
         threads * (65536 / threads / 8 * 8);
}

// Tells the compiler that x is the same in all lanes.
__device__ __forceinline__ int32_t uniform(int32_t x) { return __shfl_sync(~0u, x, 0); }
__device__ __forceinline__ Interval uniform(Interval x) { return {uniform(x.lo), uniform(x.hi)}; }

// Compiler barrier: makes the compiler read the fields of p again instead of keeping them in registers.
__device__ __forceinline__ const Problem& reload(const Problem& p) {
  const Problem* same = &p;
  asm volatile("" : "+l"(same)::"memory");
  __builtin_assume(same->leading.rank <= 1);  // plan() makes sure of this
  return *same;
}
// The same for shared memory.
__device__ __forceinline__ void reload_shared() { asm volatile("" ::: "memory"); }

// The CTA of a cluster that loads K, and the one that loads V, for all CTAs.
inline constexpr uint32_t kKeyLoader = 0, kValueLoader = 1;

__device__ __forceinline__ int warpgroup_index() {
  return uniform(static_cast<int>(threadIdx.x) / kWarpgroup);
}

// Ping-pong: consumers alternate in issuing products, so that the exponentials of one overlap the products of
// another. Each waits at a named barrier of its own, kFirstBarrier + its number, until it is allowed to
// issue.
template <int kFirstBarrier = 1>
struct IssueTurns {
  __device__ __forceinline__ static void wait(int consumer) {
    ptx::sync_group(kFirstBarrier + consumer, 2 * kWarpgroup);
  }
  __device__ __forceinline__ static void allow(int consumer) {
    ptx::arrive_group(kFirstBarrier + consumer, 2 * kWarpgroup);
  }
};

// Threads of warpgroup 0 per team.
template <int kTeams>
inline constexpr int kTeamProducers = kWarpgroup / kTeams;

// The team of this warp, and the index of a consumer warpgroup in its team.
template <int kTeams, int kConsumers>
__device__ __forceinline__ int team_of(int warpgroup) {
  return kTeams == 1      ? 0
         : warpgroup == 0 ? uniform(static_cast<int>(threadIdx.x) / kTeamProducers<kTeams>)
                          : (warpgroup - 1) / kConsumers;
}
template <int kConsumers>
__device__ __forceinline__ int consumer_index(int warpgroup) {
  return (warpgroup - 1) % kConsumers;
}

}  // namespace jax_flash
