// Which slots the new tokens of append_kv go to, and which thread block writes them.
//
// A block table with repeated pages may send two tokens to one slot, where the last must win. Therefore each
// slot is owned by one block, by a hash, and a block writes its tokens in order.
#pragma once

#include <cstdint>

#include "core/paging.h"
#include "core/problem.h"
#include "core/sequence.h"

namespace jax_flash::append {

inline constexpr int kThreads = 256;

// A new token and its slot.
struct Token {
  int64_t row;                 // in key and value, counted through all sequences
  int32_t sequence, position;  // position: of the token within its sequence
  PageSlot at;
};

// Shared by the block's threads, in shared memory.
struct State {
  int64_t starts[kThreads];       // the first rows of the current sequences, and the end of the last
  int32_t counts[kThreads / 32];  // tokens that each warp has found
  Token tokens[kThreads];
};

// Inclusive scan: the maximum of `before` and the x of all threads up to this one.
__device__ inline int64_t running_maximum(int64_t x, int64_t before, int64_t* scan) {
  scan[threadIdx.x] = max(x, before);
  __syncthreads();
  for (int step = 1; step < kThreads; step *= 2) {
    const int64_t other = static_cast<int>(threadIdx.x) >= step ? scan[threadIdx.x - step] : before;
    __syncthreads();
    scan[threadIdx.x] = max(scan[threadIdx.x], other);
    __syncthreads();
  }
  return scan[threadIdx.x];
}

// state.starts[i] ← the first row of sequence z + i, for i in [0, count]. `before`: a lower bound of the
// first one.
__device__ inline void find_starts(const AppendProblem& p, int64_t leading, int32_t z, int32_t count,
                                   int64_t before, State& state) {
  const int32_t i = static_cast<int32_t>(threadIdx.x);
  if (!p.packed()) {
    if (i <= count) state.starts[i] = (int64_t{z} + i) * p.rows;
    __syncthreads();
    return;
  }
  const View& cu = p.cu_seqlens;
  const int32_t* starts = cu.as<const int32_t>() + cu.leading_offset(p.leading, leading);
  running_maximum(i <= count ? clamp_index(starts[(int64_t{z} + i) * cu.batch], p.rows) : 0, before,
                  state.starts);
}

// Finds the sequence, position and slot of token.row among sequences [z, z + count). Returns false if the
// token has no slot: the table is full, or its entry lies outside the pool.
__device__ inline bool find_slot(const AppendProblem& p, int64_t leading, int32_t z, int32_t count,
                                 const int64_t* starts, Token& token) {
  int32_t lo = 0, hi = count - 1;  // binary search for the last sequence that begins at or before the row
  while (lo < hi) {
    const int32_t middle = hi - (hi - lo) / 2;
    if (starts[middle] <= token.row) {
      lo = middle;
    } else {
      hi = middle - 1;
    }
  }
  token.sequence = z + lo;
  const int32_t capacity = table_capacity(p.table, p.page_size);
  const int64_t lengths = p.kv_lengths.leading_offset(p.leading, leading);
  const int64_t position =
      length_at(p.kv_lengths, lengths, token.sequence, capacity) + (token.row - starts[lo]);
  if (position >= capacity) return false;
  const PageTable table =
      page_table(p.block_tables, p.leading, leading, token.sequence, p.page_size, p.pages);
  token.position = static_cast<int32_t>(position);
  token.at = table.at(token.position);
  return table.in_pool(token.at.page);
}

__device__ inline bool owns(PageSlot at, int32_t owner, int32_t owners) {
  constexpr uint32_t kMultiplier = 0x9E3779B1u;  // a prime near 2³² / golden ratio: spreads the pages
  return (static_cast<uint32_t>(at.page) * kMultiplier + static_cast<uint32_t>(at.slot)) % owners ==
         static_cast<uint32_t>(owner);
}

// Compacts the tokens of the threads that have one into state.tokens, in order, and returns their number.
__device__ inline int32_t gather(bool has, const Token& token, State& state) {
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const uint32_t votes = __ballot_sync(~0u, has);
  if (lane == 0) state.counts[warp] = __popc(votes);
  __syncthreads();
  int32_t before = 0, total = 0;
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i < warp) before += state.counts[i];
    total += state.counts[i];
  }
  if (has) state.tokens[before + __popc(votes & ((1u << lane) - 1))] = token;
  __syncthreads();
  return total;
}

// Calls write(token) by all threads, in order, for every token whose slot block `owner` of `owners` owns.
template <class Write>
__device__ inline void for_each_token(const AppendProblem& p, int64_t leading, int32_t owner, int32_t owners,
                                      State& state, Write write) {
  constexpr int32_t kSequences = kThreads - 1;
  int64_t before = 0;
  for (int32_t z = 0; z < p.batch; z += kSequences) {
    const int32_t count = min(kSequences, p.batch - z);
    find_starts(p, leading, z, count, before, state);
    before = state.starts[count];
    for (int64_t row = state.starts[0]; row < before; row += kThreads) {
      Token token{row + static_cast<int64_t>(threadIdx.x), 0, 0, {0, 0}};
      const bool has = token.row < before && find_slot(p, leading, z, count, state.starts, token) &&
                       owns(token.at, owner, owners);
      const int32_t found = gather(has, token, state);
      for (int32_t i = 0; i < found; ++i) write(state.tokens[i]);
    }
    __syncthreads();
  }
}

}  // namespace jax_flash::append
