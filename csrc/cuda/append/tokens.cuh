// Where the new tokens of append_kv go: the slot of each token, and the runs of tokens that go to one page.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/band.h"
#include "cuda/append/call.cuh"

namespace jax_flash::append {

inline constexpr int kThreads = 256, kWarps = kThreads / 32;
inline constexpr int32_t kNowhere = -1;  // stands for a page; nothing is written

// The slot of a token, and the token's position within its sequence.
struct Slot {
  int32_t page, slot, position, sequence;
};

// Tokens of a sequence that go to adjacent slots of a page. `index`: the page's entry in the sequence's table
// row.
struct Run {
  int32_t page, slot, position, sequence, index;  // slot, position and row are the first token's
  int32_t row, count;
};

// For packed sequences, in shared memory: the first row of each sequence and the end of the last one, and
// likewise the first run. Unused if all sequences have the same number of tokens.
struct Starts {
  int32_t *rows, *runs;  // [sequences + 1]

  static constexpr int64_t bytes(int64_t sequences) { return 2 * (sequences + 1) * int64_t{sizeof(int32_t)}; }
};

// Upper bound of the runs that `count` tokens of a sequence make.
__device__ __forceinline__ int32_t runs_of(const AppendCall& call, int32_t count) {
  if (count == 0) return 0;
  const int32_t whole = call.page_size.quotient(count - 1);  // ⌈(count − 1) / page size⌉ + 1
  return whole + (whole * call.page_size.value < count - 1) + 1;
}

__device__ __forceinline__ int32_t all_runs(const AppendCall& call, const Starts& starts) {
  return call.packed ? starts.runs[call.sequences] : call.sequences * call.runs.value;
}

// Replaces x by op over all threads before this one and `first`, and returns op over all of them.
template <class Op>
__device__ __forceinline__ int32_t scan_block(int32_t& x, int32_t first, int32_t* shared, Op op) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  int32_t through = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int32_t other = __shfl_up_sync(~0u, through, step);
    if (lane >= step) through = op(through, other);
  }
  const int32_t before = __shfl_up_sync(~0u, through, 1);
  __syncthreads();  // `shared` may be written again
  if (lane == 31) shared[warp] = through;
  __syncthreads();
  int32_t all = first;
  x = first;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    all = op(all, shared[w]);
    if (w < warp) x = op(x, shared[w]);
  }
  if (lane > 0) x = op(x, before);
  return all;
}

// The entries of Starts that this thread computes.
__device__ __forceinline__ Interval own_starts(const AppendCall& call) {
  const int32_t share = (call.sequences + kThreads) / kThreads;  // entries per thread, of sequences + 1
  const int32_t begin = static_cast<int32_t>(threadIdx.x) * share;
  return {begin, min(begin + share, call.sequences + 1)};
}

// Finds the first row of each packed sequence, the running maximum of cu_seqlens. All threads must call this,
// and may read the rows afterwards. `shared`: [kWarps].
__device__ inline void find_first_rows(const AppendCall& call, int32_t entry, const Starts& starts,
                                       int32_t* shared) {
  const auto maximum = [](int32_t a, int32_t b) { return max(a, b); };
  const auto start_of = [&](int32_t z) {
    return clamp_index(*call.cu_seqlens.at<const int32_t>(entry, z, 0, 0), call.tokens);
  };
  const auto thread = static_cast<int32_t>(threadIdx.x);
  int32_t before = 0;
  if (call.earlier > 0) {  // earlier launches have handled some sequences
    int32_t x = 0;
    for (int32_t z = thread - call.earlier; z < 0; z += kThreads) x = max(x, start_of(z));
    before = scan_block(x, 0, shared, maximum);
  }
  const Interval own = own_starts(call);
  int32_t x = 0;
  for (int32_t z = own.lo; z < own.hi; ++z) starts.rows[z] = x = max(x, start_of(z));
  scan_block(x, before, shared, maximum);
  for (int32_t z = own.lo; z < own.hi; ++z) starts.rows[z] = max(starts.rows[z], x);
  __syncthreads();
}

// Finds the first run of each sequence, in the same way.
__device__ inline void find_first_runs(const AppendCall& call, const Starts& starts, int32_t* shared) {
  const Interval own = own_starts(call);
  const auto runs = [&](int32_t z) {
    return z < call.sequences ? runs_of(call, starts.rows[z + 1] - starts.rows[z]) : 0;
  };
  int32_t sum = 0;
  for (int32_t z = own.lo; z < own.hi; ++z) sum += runs(z);
  scan_block(sum, 0, shared, [](int32_t a, int32_t b) { return a + b; });
  for (int32_t z = own.lo; z < own.hi; ++z) starts.runs[z] = sum, sum += runs(z);
  __syncthreads();
}

// Finds the first rows and runs of all sequences.
__device__ __forceinline__ void find_starts(const AppendCall& call, int32_t entry, const Starts& starts,
                                            int32_t* shared) {
  find_first_rows(call, entry, starts, shared);
  find_first_runs(call, starts, shared);
}

// The last of `count` starts, which never decrease, that is at most x.
__device__ __forceinline__ int32_t last_at_most(const int32_t* starts, int32_t count, int32_t x) {
  int32_t lo = 0, hi = count - 1;
  while (lo < hi) {
    const int32_t middle = hi - (hi - lo) / 2;
    if (starts[middle] <= x) {
      lo = middle;
    } else {
      hi = middle - 1;
    }
  }
  return lo;
}

__device__ __forceinline__ bool in_sequences(const AppendCall& call, const Starts& starts, int32_t row) {
  return call.packed ? row >= starts.rows[0] && row < starts.rows[call.sequences] : row < call.tokens;
}

// The sequence of a row; the row must be in one.
__device__ __forceinline__ int32_t sequence_of(const AppendCall& call, const Starts& starts, int32_t row) {
  return call.packed ? last_at_most(starts.rows, call.sequences, row) : call.rows.quotient(row);
}

__device__ __forceinline__ int32_t first_row(const AppendCall& call, const Starts& starts, int32_t sequence) {
  return call.packed ? starts.rows[sequence] : sequence * call.rows.value;
}

__device__ __forceinline__ int32_t length_before(const AppendCall& call, int32_t entry, int32_t sequence) {
  return clamp_index(*call.kv_lengths.at<const int32_t>(entry, sequence, 0, 0), call.capacity);
}

__device__ __forceinline__ int32_t page_at(const AppendCall& call, int32_t entry, int32_t sequence,
                                           int32_t index) {
  const int32_t page = call.block_tables.at<const int32_t>(entry, sequence, 0, 0)[index];
  return static_cast<uint32_t>(page) < static_cast<uint32_t>(call.pages) ? page : kNowhere;
}

// A token's sequence and position, before its page is looked up. The position is −1 if the token is in no
// sequence, or the table is full.
struct Place {
  int32_t sequence, position, index;
};
__device__ __forceinline__ Place find_place(const AppendCall& call, int32_t entry, const Starts& starts,
                                            int32_t row) {
  if (!in_sequences(call, starts, row)) return {0, -1, 0};
  const int32_t sequence = sequence_of(call, starts, row);
  const auto position = static_cast<uint32_t>(length_before(call, entry, sequence)) +
                        static_cast<uint32_t>(row - first_row(call, starts, sequence));
  if (position >= static_cast<uint32_t>(call.capacity)) return {0, -1, 0};
  const auto at = static_cast<int32_t>(position);
  return {sequence, at, call.page_size.quotient(at)};
}

// The slot of a token: kNowhere if it has none, or if the table's entry lies outside the pool.
__device__ inline Slot find_slot(const AppendCall& call, int32_t entry, const Starts& starts, int32_t row) {
  const Place to = find_place(call, entry, starts, row);
  if (to.position < 0) return {kNowhere, 0, 0, 0};
  return {page_at(call, entry, to.sequence, to.index), to.position - to.index * call.page_size.value,
          to.position, to.sequence};
}

// The sequence of a run, given the run's number, which is below all_runs().
__device__ __forceinline__ int32_t sequence_of_run(const AppendCall& call, const Starts& starts,
                                                   int32_t number) {
  return call.packed ? last_at_most(starts.runs, call.sequences, number) : call.runs.quotient(number);
}

// A run, before its page is looked up. It has no tokens if there is no such run, or if none of it is written.
// `length`: the sequence's length before the call.
__device__ __forceinline__ Run place_run(const AppendCall& call, const Starts& starts, int32_t number,
                                         int32_t sequence, int32_t length) {
  const int32_t first = call.packed ? starts.runs[sequence] : sequence * call.runs.value;
  const int32_t row = first_row(call, starts, sequence);
  const auto begin = static_cast<uint32_t>(length), size = static_cast<uint32_t>(call.page_size.value);
  const uint32_t end = min(begin + static_cast<uint32_t>(first_row(call, starts, sequence + 1) - row),
                           static_cast<uint32_t>(call.capacity));
  const int32_t index = call.page_size.quotient(length) + (number - first);
  if (begin >= end || index > call.page_size.quotient(static_cast<int32_t>(end - 1)))
    return {kNowhere, 0, 0, 0, 0, 0, 0};
  const uint32_t page_begin = static_cast<uint32_t>(index) * size, position = max(begin, page_begin);
  return {kNowhere,
          static_cast<int32_t>(position - page_begin),
          static_cast<int32_t>(position),
          sequence,
          index,
          row + static_cast<int32_t>(position - begin),
          static_cast<int32_t>(min(end - page_begin, size) - (position - page_begin))};
}

// A run with its page: kNowhere if the run has no tokens, or if the table's entry lies outside the pool.
__device__ inline Run find_run(const AppendCall& call, int32_t entry, const Starts& starts, int32_t number) {
  const int32_t sequence = sequence_of_run(call, starts, number);
  Run run = place_run(call, starts, number, sequence, length_before(call, entry, sequence));
  if (run.count > 0) run.page = page_at(call, entry, sequence, run.index);
  return run;
}

}  // namespace jax_flash::append
