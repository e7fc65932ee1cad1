// The tokens that a block writes: their slots, and which of them a later token overwrites.
//
// Two tokens may be sent to one slot, and then the later one must win. This happens only if two table entries
// name one page, so every block looks all pages up. Only if one of its own pages occurs again does a block
// look up the slots of all later tokens, and it skips its own tokens that one of them overwrites. So every
// slot has one writer, and no block waits for another.
#pragma once

#include <cstdint>

#include "cuda/append/tokens.cuh"

namespace jax_flash::append {

inline constexpr int kAtOnce = 2;  // runs that a thread looks up together
// Up to this many own tokens are compared directly; with more, a filter of their pages comes first.
inline constexpr int32_t kFew = 8;
inline constexpr int32_t kMostTokens = 128;  // tokens per block
inline constexpr int32_t kFilterBits = 10;

struct Shared {
  Slot own[kMostTokens];
  bool overwritten[kMostTokens];
  bool filter[1 << kFilterBits];  // whether an own token is on a page with this hash
  int32_t scan[kWarps];
};

__device__ __forceinline__ uint32_t hash(int32_t page) {
  constexpr uint32_t kMultiplier = 0x9E3779B1u;  // a prime near 2³² / golden ratio
  return static_cast<uint32_t>(page) * kMultiplier >> (32 - kFilterBits);
}

// The tokens [first, first + count) of a block, and whether the filter is used.
struct Own {
  int32_t first, count;
  bool filtered;

  __device__ __forceinline__ bool may_hold(int32_t page, const Shared& shared) const {
    return page != kNowhere && (!filtered || shared.filter[hash(page)]);
  }
};

// Whether a run of other tokens goes to the page of one of the own tokens.
__device__ __forceinline__ bool meets_own(const AppendCall& call, const Own& own, const Run& run,
                                          const Shared& shared) {
  bool meets = false;
  for (int32_t i = 0; own.may_hold(run.page, shared) && i < own.count; ++i) {
    const Slot& to = shared.own[i];
    meets |= to.page == run.page &&
             (to.sequence != run.sequence || call.page_size.quotient(to.position) != run.index);
  }
  return meets;
}

// Marks the own tokens that the later token `row` overwrites.
__device__ __forceinline__ void mark_overwritten(const Own& own, int32_t row, const Slot& slot,
                                                 Shared& shared) {
  for (int32_t i = 0; i < min(own.count, row - own.first); ++i) {
    const Slot& to = shared.own[i];
    if (to.page == slot.page && to.slot == slot.slot) shared.overwritten[i] = true;
  }
}

// Marks the own tokens that a later one overwrites.
static __device__ __noinline__ void find_overwritten(const AppendCall& call, int32_t entry, Starts starts,
                                                     Own own, Shared& shared) {
  for (int32_t row = own.first + static_cast<int32_t>(threadIdx.x); row < call.tokens; row += kThreads) {
    const Slot slot = find_slot(call, entry, starts, row);
    if (own.may_hold(slot.page, shared)) mark_overwritten(own, row, slot, shared);
  }
  __syncthreads();
}

// find_own() for blocks that have a thread for every token; each thread looks up the slot of its token.
__device__ __forceinline__ void find_own_of_few(const AppendCall& call, int32_t entry, const Own& own,
                                                const Starts& starts, Shared& shared) {
  const auto row = static_cast<int32_t>(threadIdx.x);
  Slot slot{kNowhere, 0, 0, 0};
  if (row < call.tokens) slot = find_slot(call, entry, starts, row);
  const int32_t number = row - own.first;
  if (number >= 0 && number < own.count) shared.own[number] = slot, shared.overwritten[number] = false;
  __syncthreads();
  if (slot.page != kNowhere) mark_overwritten(own, row, slot, shared);
  __syncthreads();
}

// Finds the slots of the own tokens, and which of them a later token overwrites. All threads must call this,
// after the starts have been found.
__device__ __forceinline__ void find_own(const AppendCall& call, int32_t entry, const Own& own,
                                         const Starts& starts, Shared& shared) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  if (own.filtered) {
    for (int32_t i = thread; i < 1 << kFilterBits; i += kThreads) shared.filter[i] = false;
    __syncthreads();
  }
  Slot slot{kNowhere, 0, 0, 0};
  if (thread < own.count) slot = find_slot(call, entry, starts, own.first + thread);
  const int32_t all = all_runs(call, starts);
  bool meets = false;
  int32_t number = thread;
#pragma unroll 1
  do {  // runs once even if no sequence has a token
    Run runs[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      runs[i].page = kNowhere;
      if (number + i * kThreads < all) runs[i] = find_run(call, entry, starts, number + i * kThreads);
    }
    if (number == thread) {
      if (thread < own.count) {
        shared.own[thread] = slot, shared.overwritten[thread] = false;
        if (own.filtered && slot.page != kNowhere) shared.filter[hash(slot.page)] = true;
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) meets |= meets_own(call, own, runs[i], shared);
    number += kAtOnce * kThreads;
  } while (number - thread < all);
  if (__syncthreads_or(meets)) find_overwritten(call, entry, starts, own, shared);
}

}  // namespace jax_flash::append
