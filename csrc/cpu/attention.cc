#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "decode_plan.h"
#include "kernels.h"
#include "memory.h"
#include "plan.h"
#include "slots.h"
#include "splits.h"

namespace jax_flash {

namespace baseline {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}

namespace {

const Kernels& choose_kernels() {
  struct Candidate {
    const Kernels* kernels;
    bool usable;
  };
  const Candidate candidates[] = {
#if defined(JF_HAS_AVX512_BF16)
      {&avx512_bf16::kKernels,
       __builtin_cpu_supports("x86-64-v4") != 0 && __builtin_cpu_supports("avx512bf16") != 0},
#endif
#if defined(JF_HAS_AVX512)
      {&avx512::kKernels, __builtin_cpu_supports("x86-64-v4") != 0},
#endif
#if defined(JF_HAS_AVX2)
      {&avx2::kKernels, __builtin_cpu_supports("x86-64-v3") != 0},
#endif
#if defined(JF_HAS_BASELINE)
      {&baseline::kKernels, true},
#endif
  };
  const char* forced = std::getenv("JAX_FLASH_CPU_ISA");
  std::string names;
  for (const Candidate& c : candidates) {
    if (c.usable && (!forced || !*forced || std::strcmp(forced, c.kernels->isa) == 0)) return *c.kernels;
    if (c.usable) names += std::string(names.empty() ? "" : ", ") + c.kernels->isa;
  }
  throw std::invalid_argument("jax_flash: JAX_FLASH_CPU_ISA is \"" + std::string(forced ? forced : "") +
                              "\", this machine and build have: " + names);
}

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

// Scratch of the calling thread, kept for the thread's lifetime: faulting in fresh pages on each call costs
// more than small problems do.
float* scratch() {
  thread_local Floats memory;
  if (!memory) memory = aligned_floats(kScratchFloats);
  return memory.get();
}

// Memory for the partial outputs of decode, kept by the thread that makes the call.
float* decode_parts(int64_t floats) {
  thread_local Floats memory;
  thread_local int64_t size = 0;
  if (floats > size) {
    memory = aligned_floats(floats);
    size = floats;  // only now, since the allocation may throw
  }
  return memory.get();
}

// The number of threads worth waking for this many multiply-adds.
int64_t workers_for(double multiplies) {
  constexpr double kPerWorker = 1 << 18;
  return static_cast<int64_t>(std::min(multiplies / kPerWorker, 1e6)) + 1;
}

constexpr double kTangentProducts = 2.5;  // products of the tangent pass, relative to the forward's
constexpr double kCostOfCopying = 4;      // cost of copying an element, in multiply-adds

double score_count(const Problem& p) {
  return double(p.leading.count()) * (p.packed() ? 1 : p.batch) * p.heads * p.q_rows * double(p.k_rows);
}

// Merges a tile's partial outputs, `size` floats apart, in order, and stores out and lse.
void merge_and_store(const Problem& p, const RowTile& tile, float* parts, int64_t size) {
  for (int32_t i = 1; i < tile.parts; ++i) kernels().merge_parts(p, tile, parts, parts + i * size);
  kernels().store_part(p, tile, parts);
}

// Runs a tile that is split into parts on one thread, part after part.
void forward_in_parts(const Problem& p, const RowTile& tile) {
  const int64_t size = kernels().part_floats(p, tile);
  const Floats memory = aligned_floats(2 * size);
  float *first = memory.get(), *other = first + size;
  kernels().forward_part(p, tile, 0, first, scratch());
  for (int32_t i = 1; i < tile.parts; ++i) {
    kernels().forward_part(p, tile, i, other, scratch());
    kernels().merge_parts(p, tile, first, other);
  }
  kernels().store_part(p, tile, first);
}

// The tiles whose parts are separate work items, and the memory for their partial outputs.
class ParallelParts {
 public:
  struct Tile {
    RowTile rows;
    int64_t offset, part_floats;  // offset and size of the tile's partial outputs, in floats
  };
  struct Part {
    int32_t tile, index;
  };

  ParallelParts(const Problem& p, const RowGrid& grid, const Splits& splits) {
    int64_t floats = 0;
    for (int64_t index = 0; index < grid.size(); ++index) {
      RowTile tile;
      if (!splits.at(index, tile) || !splits.is_parallel(tile)) continue;
      const int64_t size = kernels().part_floats(p, tile);
      if (floats + size * tile.parts > kMaxPartFloats) break;
      for (int32_t i = 0; i < tile.parts; ++i) parts_.push_back({static_cast<int32_t>(tiles_.size()), i});
      tiles_.push_back({tile, floats, size});
      floats += size * tile.parts;
      end_ = index + 1;
    }
    memory_.emplace(floats);
  }

  const std::vector<Tile>& tiles() const { return tiles_; }
  const std::vector<Part>& parts() const { return parts_; }
  float* memory(const Tile& tile, int32_t part) const {
    return memory_->get() + tile.offset + part * tile.part_floats;
  }

  // Whether the tile at `index` of the grid is among them.
  bool has(int64_t index, const Splits& splits, const RowTile& tile) const {
    return index < end_ && splits.is_parallel(tile);
  }

 private:
  std::vector<Tile> tiles_;
  std::vector<Part> parts_;
  int64_t end_ = 0;
  std::optional<CachedFloats> memory_;
};

// Runs tiles [begin, end) of the grid in order. Tiles that share a KV head run together, up to `most`, so
// that its keys are packed once: run(tiles, count). Indices for which at(index, tile) is false are skipped.
template <class At, class Run>
void run_range(int64_t begin, int64_t end, int32_t most, At at, Run run) {
  RowTile tiles[kMaxQueryTiles];
  int32_t count = 0;
  for (int64_t index = begin; index < end; ++index) {
    RowTile tile;
    if (!at(index, tile)) continue;
    const bool joins = count > 0 && count < most && tiles[0].leading == tile.leading &&
                       tiles[0].sequence.index == tile.sequence.index && tiles[0].head == tile.head;
    if (!joins) {
      if (count > 0) run(tiles, count);
      count = 0;
    }
    tiles[count++] = tile;
  }
  if (count > 0) run(tiles, count);
}

// Runs the forward of tiles [begin, end) on this thread, except for those in `parallel`.
void forward_range(const Problem& p, const Splits& splits, const ParallelParts& parallel, int64_t begin,
                   int64_t end) {
  const auto at = [&](int64_t index, RowTile& tile) {
    if (!splits.at(index, tile) || parallel.has(index, splits, tile)) return false;
    if (tile.parts > 1) forward_in_parts(p, tile);
    return tile.parts == 1;
  };
  run_range(begin, end, kMaxQueryTiles, at,
            [&](const RowTile* tiles, int32_t count) { kernels().forward(p, tiles, count, scratch()); });
}

// Divides the tiles into contiguous ranges, which are the work items, and returns the ranges' ends. A range
// packs shared keys once, so the first ones are large; the later ones are ever smaller, which balances the
// threads. The ranges do not change any bit of the result.
std::vector<int64_t> range_ends(const Splits& splits, int64_t size, int64_t threads) {
  // The first range has 1 / kFirst of a thread's share of the work, the last ones 1 / kLast.
  constexpr double kFirst = 1.5, kLast = 64;
  std::vector<int64_t> ends;
  if (size == 0) return ends;
  const double most = static_cast<double>(threads) * kFirst,
               least = 1.0 / (static_cast<double>(threads) * kLast);
  for (double left = 1.0; threads > 1 && left > least;) {
    left -= std::max(left / most, least);
    const int64_t end = splits.first_tile_after(1.0 - left);
    if (end > (ends.empty() ? 0 : ends.back())) ends.push_back(end);
  }
  if (ends.empty() || ends.back() < size) ends.push_back(size);
  return ends;
}

// Runs the longest items first: the parts of split tiles, then ranges of the other tiles; at the end the
// partial outputs are merged.
void run_forward(const Problem& p, const ThreadPool& pool, const RowGrid& grid, const Splits& splits) {
  const ParallelParts parallel(p, grid, splits);
  const auto parts = static_cast<int64_t>(parallel.parts().size());
  const int64_t workers = workers_for(splits.cost() * (p.head_dim + p.value_dim));
  const std::vector<int64_t> ends = range_ends(splits, grid.size(), std::min(pool.threads, workers));
  parallel_for(pool, parts + static_cast<int64_t>(ends.size()), workers, [&](int64_t item) {
    if (item < parts) {
      const ParallelParts::Part& part = parallel.parts()[item];
      const ParallelParts::Tile& tile = parallel.tiles()[part.tile];
      kernels().forward_part(p, tile.rows, part.index, parallel.memory(tile, part.index), scratch());
    } else {
      const int64_t range = item - parts;
      forward_range(p, splits, parallel, range > 0 ? ends[range - 1] : 0, ends[range]);
    }
  });
  parallel_for(pool, static_cast<int64_t>(parallel.tiles().size()), workers, [&](int64_t index) {
    const ParallelParts::Tile& tile = parallel.tiles()[index];
    merge_and_store(p, tile.rows, parallel.memory(tile, 0), tile.part_floats);
  });
}

// Runs the parts of decode tiles as work items. The thread that finishes the last part of a tile merges all
// of them, in order.
void run_decode(const Problem& p, const ThreadPool& pool, const DecodePlan& plan) {
  float* memory = decode_parts(plan.part_floats());
  std::vector<std::atomic<int32_t>> unfinished(plan.tiles().size());
  for (size_t i = 0; i < unfinished.size(); ++i) unfinished[i] = plan.tiles()[i].rows.parts;
  parallel_for(pool, static_cast<int64_t>(plan.items().size()), plan.workers(), [&](int64_t index) {
    const DecodePlan::Item item = plan.items()[index];
    const DecodePlan::Tile& tile = plan.tiles()[item.tile];
    const RowTile& rows = tile.rows;
    if (rows.parts == 1) return kernels().forward(p, &rows, 1, scratch());
    if (item.part < 0) return forward_in_parts(p, rows);
    float* parts = memory + tile.offset;
    kernels().forward_part(p, rows, item.part, parts + item.part * tile.part_floats, scratch());
    if (--unfinished[item.tile] > 0) return;
    merge_and_store(p, rows, parts, tile.part_floats);
  });
}

// Limit on the memory that the backward's work items share. One query head in progress is always allowed,
// whatever it needs.
constexpr int64_t kMaxSharedFloats = int64_t{1} << 23;

// Keeps as many query heads in progress as there are threads, each with its packed operands and its dQ
// accumulator.
void run_backward(const Problem& p, const Starts& starts, const ThreadPool& pool) {
  const KeyGrid grid(p, starts, kernels().gradient_n);
  // At least one tile, whose work item zeros the gradients of a sequence without rows.
  const auto tiles = [&](const std::vector<int32_t>& starts_of, int32_t rows, int32_t tile) {
    return std::max<int64_t>(1, ceil_div(p.packed() ? Starts::longest(starts_of) : rows, tile));
  };
  const int64_t query_tiles = tiles(starts.q, p.q_rows, kernels().gradient_m);
  const int64_t key_tiles = tiles(starts.k, p.k_rows, kernels().gradient_n);
  const int64_t query_floats = query_tiles * kernels().query_tile_floats(p);
  const int64_t width =
      std::max<int64_t>(1, std::min({grid.units(), kMaxSharedFloats / query_floats, pool.threads}));
  // The largest number of KV heads that the query heads in progress can belong to.
  const int64_t key_slots = grid.group() == 1 ? 0 : (width - 1) / grid.group() + 2;
  const int64_t key_floats = key_tiles * kernels().key_tile_floats(p);
  const CachedFloats memory(width * query_floats + key_slots * key_floats);
  int32_t abandoned = 0;
  Slots queries(width, query_floats, query_tiles, memory.get(), &abandoned);
  Slots keys(key_slots, key_floats, key_tiles, memory.get() + width * query_floats, &abandoned);

  const std::vector<KeyGrid::Item> items = grid.schedule(width);
  const double multiplies = score_count(p) * (p.head_dim + p.value_dim);
  parallel_for(pool, static_cast<int64_t>(items.size()), workers_for(multiplies), [&](int64_t index) {
    const KeyGrid::Item item = items[index];
    const int64_t kv = item.unit / grid.group();
    const int32_t of_unit = grid.items(item.unit);
    try {
      SharedGradients shared{queries.acquire(item.unit), queries.progress(item.unit)};
      if (key_slots > 0) shared.keys = keys.acquire(kv), shared.key_progress = keys.progress(kv);
      kernels().backward(p, grid.at(item), shared, scratch());
    } catch (...) {
      __atomic_store_n(&abandoned, 1, __ATOMIC_RELEASE);  // releases the threads that wait for this item
      throw;
    }
    queries.release(item.unit, of_unit);
    if (key_slots > 0) keys.release(kv, of_unit * grid.group());
  });
}

// Calls fill(leading, begin, end) for ranges of a packed operand's rows that belong to no sequence.
template <class Fill>
void outside_sequences(const Problem& p, const std::vector<int32_t>& starts, int32_t rows, Fill fill) {
  if (!p.packed()) return;
  for (int64_t l = 0; l < p.leading.count(); ++l) {
    const int32_t* own = starts.data() + l * (int64_t{p.batch} + 1);
    fill(l, 0, own[0]);
    fill(l, own[p.batch], rows);
  }
}

void zero_rows(const Problem& p, const View& view, int64_t leading, int32_t begin, int32_t end) {
  const int64_t size = size_of(p.dtype);
  char* data = view.as<char>() + (view.leading_offset(p.leading, leading) + begin * view.row) * size;
  if (begin < end) std::memset(data, 0, (end - begin) * view.row * size);
}

// Sets rows [begin, end) of lse or its tangent.
void fill_statistic(const Problem& p, const View& view, int64_t leading, int32_t begin, int32_t end,
                    float x) {
  for (int32_t h = 0; h < p.heads; ++h) {
    float* of_head = view.as<float>() + view.leading_offset(p.leading, leading) + h * view.head;
    std::fill(of_head + begin, of_head + std::max(begin, end), x);
  }
}

}  // namespace

const char* cpu_isa() { return kernels().isa; }

void cpu_forward(const Problem& p, const ThreadPool& pool) {
  const Starts starts(p);
  const DecodePlan decode(p, starts, kernels());
  run_decode(p, pool, decode);
  const RowGrid grid(p, starts, GridRows::kPrefill, kernels().tile_m);
  if (!decode.covers_all_rows()) run_forward(p, pool, grid, Splits(p, grid));
  outside_sequences(p, starts.q, p.q_rows, [&](int64_t l, int32_t begin, int32_t end) {
    zero_rows(p, p.out, l, begin, end);
    fill_statistic(p, p.lse, l, begin, end, -std::numeric_limits<float>::infinity());
    if (p.row_max) fill_statistic(p, p.row_max, l, begin, end, -std::numeric_limits<float>::infinity());
  });
}

void cpu_backward(const Problem& p, const ThreadPool& pool) {
  const Starts starts(p);
  run_backward(p, starts, pool);
  outside_sequences(p, starts.q, p.q_rows,
                    [&](int64_t l, int32_t begin, int32_t end) { zero_rows(p, p.dquery, l, begin, end); });
  outside_sequences(p, starts.k, p.k_rows, [&](int64_t l, int32_t begin, int32_t end) {
    zero_rows(p, p.dkey, l, begin, end);
    if (!p.spec.shared_kv()) zero_rows(p, p.dvalue, l, begin, end);
  });
}

void cpu_tangent(const Problem& p, const Tangents& t, const ThreadPool& pool) {
  const Starts starts(p);
  const RowGrid grid(p, starts, GridRows::kAll, kernels().tile_m);
  const Splits splits(p, grid);
  const int64_t workers = workers_for(splits.cost() * (p.head_dim + p.value_dim) * kTangentProducts);
  const std::vector<int64_t> ends = range_ends(splits, grid.size(), std::min(pool.threads, workers));
  parallel_for(pool, static_cast<int64_t>(ends.size()), workers, [&](int64_t range) {
    run_range(
        range > 0 ? ends[range - 1] : 0, ends[range], kernels().tangent_tiles(p),
        [&](int64_t index, RowTile& tile) { return grid.at(index, tile); },
        [&](const RowTile* tiles, int32_t count) { kernels().tangent(p, t, tiles, count, scratch()); });
  });
  outside_sequences(p, starts.q, p.q_rows, [&](int64_t l, int32_t begin, int32_t end) {
    zero_rows(p, t.tout, l, begin, end);
    fill_statistic(p, t.tlse, l, begin, end, 0);
  });
}

void cpu_bias_gradient(const Problem& p, const ThreadPool& pool) {
  const BiasGrid grid(p, kernels().gradient_m, kernels().gradient_n);
  parallel_for(pool, grid.size(), workers_for(score_count(p) * (p.head_dim + p.value_dim)),
               [&](int64_t index) { kernels().bias_gradient(p, grid.at(index), scratch()); });
}

void cpu_append(const AppendProblem& p, const ThreadPool& pool) {
  const double copied = double(p.leading.count()) * p.kv_heads * p.q_rows * (p.packed() ? 1 : p.batch) *
                        (p.head_dim + p.value_dim);
  // The grouping of heads into items does not change any result.
  const int64_t workers = workers_for(copied * kCostOfCopying);
  const int64_t most = ceil_div(p.kv_heads, std::max<int64_t>(std::min(pool.threads, workers), 1));
  const int64_t ranges = most > 0 ? ceil_div(p.kv_heads, most) : 0;
  parallel_for(pool, p.leading.count() * ranges, workers, [&](int64_t index) {
    const int64_t head = index % ranges * most;
    kernels().append(p, index / ranges, static_cast<int32_t>(head),
                     static_cast<int32_t>(std::min(most, p.kv_heads - head)));
  });
}

}  // namespace jax_flash
