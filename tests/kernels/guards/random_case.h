// Shared by the drivers: random choices, views backed by guarded memory, failures that name the call.
#pragma once

#include <signal.h>

#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <list>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "backend.h"
#include "core/views.h"
#include "guarded.h"
#include "names.h"
#include "values.h"

// Only in builds with sanitizers.
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());

namespace jax_flash {

inline std::string current_call;  // seed and description, for failures

inline constexpr float kInf = std::numeric_limits<float>::infinity();

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\nin call %s\n", what.c_str(), current_call.c_str());
  std::exit(1);
}

// On a fault, reports which operand's guard page was touched; then the signal takes its default action.
inline void name_faults() {
  static struct sigaction before;
  struct sigaction naming = {};
  naming.sa_flags = SA_SIGINFO;
  naming.sa_sigaction = [](int number, siginfo_t* info, void*) {
    std::fprintf(stderr, "FAILED: an access %s\nin call %s\n", Guarded::describe(info->si_addr).c_str(),
                 current_call.c_str());
    sigaction(number, &before, nullptr);
  };
  sigaction(SIGSEGV, &naming, &before);
}

struct Dim {
  int64_t size;
  int64_t View::* stride;
};

class RandomCase {
 public:
  explicit RandomCase(uint64_t seed) : random_(seed) {}

 protected:
  // Uniform in [lo, hi].
  int64_t integer(int64_t lo, int64_t hi) { return std::uniform_int_distribution<int64_t>(lo, hi)(random_); }
  bool chance(double p) { return std::uniform_real_distribution<double>(0, 1)(random_) < p; }
  float normal() { return std::normal_distribution<float>(0, 1)(random_); }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return *(values.begin() + integer(0, static_cast<int64_t>(values.size()) - 1));
  }

  // Computed independently of how the library reads the index arrays.
  static int64_t clamp(int64_t x, int64_t limit) { return x < 0 ? 0 : x > limit ? limit : x; }

  static int64_t usual_or(int64_t usual, int64_t sparing) { return backend::sparing() ? sparing : usual; }

  // A head dim of at most `limit`; half the time `limit` itself.
  int32_t width_within(int32_t limit) {
    return chance(0.5) ? limit : backend::width(static_cast<int32_t>(integer(1, limit)));
  }

  Leading random_leading() {
    Leading leading;
    leading.rank = static_cast<int32_t>(chance(0.7) || backend::sparing() ? 0 : integer(1, 2));
    for (int i = 0; i < leading.rank; ++i) leading.size[i] = integer(2, 3);
    return leading;
  }

  // Gives the view memory and strides: the leading dimensions (each full, or 1 when `broadcast`), then
  // `dims`, contiguous.
  Guarded& make(View& view, const Leading& leading, size_t element, std::vector<Dim> dims, bool broadcast) {
    int64_t count = 1;
    for (size_t i = dims.size(); i-- > 0;) {
      if (dims[i].stride) view.*dims[i].stride = count;
      count *= dims[i].size;
    }
    for (int i = leading.rank; i-- > 0;) {
      if (broadcast && chance(0.4)) continue;
      view.leading[i] = count;
      count *= leading.size[i];
    }
    Guarded& memory = memory_.emplace_back(static_cast<size_t>(count) * element, chance(0.7));
    if (const auto found = names_.find(&view); found != names_.end()) memory.name = found->second;
    view.data = memory.data();
    return memory;
  }

  void fill(const Guarded& m, DType dtype) {
    if (!backend::computes()) return;
    for (size_t i = 0; i < m.bytes(); i += size_of(dtype)) set_value(dtype, m.data() + i, normal());
  }

  // Sinks by head, or by token.
  void make_sinks(Problem& p, const Leading& leading) {
    std::vector<Dim> dims{{p.heads, &View::head}};
    if (chance(0.5)) {
      dims.insert(dims.begin(), {p.q_rows, &View::row});
      if (!p.packed()) dims.insert(dims.begin(), {p.batch, &View::batch});
    }
    fill(make(p.sinks, leading, 4, std::move(dims), true), DType::kF32);
  }

  // The dims of an operand with rows and columns for each head. Batch entries and heads may be broadcast;
  // without `batch`, the rows of all sequences share a dimension.
  std::vector<Dim> dims_by_head(const Problem& p, bool batch, Dim row, Dim column) {
    std::vector<Dim> dims{{p.heads, &View::head}, row, column};
    if (batch) dims.insert(dims.begin(), {p.batch, &View::batch});
    for (size_t i = 0; i + 2 < dims.size(); ++i) broadcast_some(dims[i]);
    return dims;
  }
  // `whole`: only a dimension of size 1 is broadcast.
  void broadcast_some(Dim& dim, bool whole = false) {
    if (dim.size == 1 || (chance(0.4) && !whole)) dim = {1, nullptr};
  }

  void choose_ranges(Problem& p) {
    p.spec.operands |= bits_of(Operand::kRanges);
    p.limits = one_of({2, 4});
    in_order_ = chance(0.5);
    constexpr int32_t kSeveralTiles = 520;  // keys, so that a gap may hold tiles
    if (in_order_ && !p.paged() && chance(0.4)) p.k_rows = std::max(p.k_rows, kSeveralTiles);
  }
  // Plausible or arbitrary limits; rows of a tile often have the same. In order, two ranges leave a gap.
  void make_ranges(Problem& p, const Leading& leading) {
    const Dim row{p.q_rows, &View::row}, column{p.limits, &View::column};
    const Guarded& m = make(p.ranges, leading, 4, dims_by_head(p, !p.packed(), row, column), true);
    int32_t* x = reinterpret_cast<int32_t*>(m.data());
    const int64_t repeat = p.limits * one_of<int64_t>({1, 1, 20, 1000});
    const bool wild = chance(0.3);
    for (size_t i = 0; i < m.bytes() / 4; ++i) {
      x[i] = wild ? garbage(p.k_rows) : static_cast<int32_t>(integer(0, p.k_rows));
      if (static_cast<int64_t>(i) % repeat >= p.limits) x[i] = x[i - p.limits];
      if (in_order_ && static_cast<int64_t>(i + 1) % p.limits == 0)
        std::sort(x + i + 1 - p.limits, x + i + 1);
    }
    m.make_read_only();
  }

  // A window that is data.
  void choose_window(Problem& p) {
    for (Operand operand : {Operand::kWindowLeft, Operand::kWindowRight, Operand::kWindowOffset})
      if (chance(0.1)) p.spec.operands |= bits_of(operand);
  }
  void make_window(Problem& p, const Leading& leading) {
    const auto make_numbers = [&](Operand operand, View& view) {
      if (!p.spec.has(operand)) return;
      Dim entries{p.batch, &View::batch};
      broadcast_some(entries);
      const Guarded& m = make(view, leading, 4, {entries}, true);
      const bool wild = chance(0.3);
      for (size_t i = 0; i < m.bytes() / 4; ++i)
        reinterpret_cast<int32_t*>(m.data())[i] =
            wild ? garbage(p.k_rows) : static_cast<int32_t>(integer(-5, p.k_rows));
      m.make_read_only();
    };
    make_numbers(Operand::kWindowLeft, p.window_left);
    make_numbers(Operand::kWindowRight, p.window_right);
    make_numbers(Operand::kWindowOffset, p.window_offset);
  }

  // The last blocks may reach past the sequences, or end before them. `rows`, `keys`: the sizes to choose
  // from.
  void choose_blocks(Problem& p, std::initializer_list<int32_t> rows = {16, 48, 64, 256},
                     std::initializer_list<int32_t> keys = {16, 32, 128, 144}) {
    p.spec.operands |= bits_of(Operand::kBlockMask);
    p.spec.block_rows = one_of(rows), p.spec.block_keys = one_of(keys);
    const auto blocks = [&](int32_t all, int32_t block) {
      return 1 + static_cast<int32_t>(integer(0, all / block));
    };
    p.mask_rows = blocks(p.q_rows, p.spec.block_rows), p.mask_columns = blocks(p.k_rows, p.spec.block_keys);
  }
  void make_blocks(Problem& p, const Leading& leading) {
    const Dim row{p.mask_rows, &View::row}, column{p.mask_columns, &View::column};
    const Guarded& m = make(p.block_mask, leading, 1, dims_by_head(p, true, row, column), true);
    for (size_t i = 0; i < m.bytes(); ++i) m.data()[i] = chance(0.6);
    m.make_read_only();
  }

  // Any int32; most often one near 0 or near `limit`.
  int32_t garbage(int32_t limit) {
    return one_of<int32_t>({INT_MIN, INT_MIN + 1, -1, 0, 1, limit, limit == INT_MAX ? limit : limit + 1,
                            INT_MAX, static_cast<int32_t>(random_()),
                            static_cast<int32_t>(integer(0, limit))});
  }

  const Guarded& memory_of(const View* view) const {
    for (const Guarded& m : memory_) {
      if (m.data() == view->data) return m;
    }
    fail("a view without memory");
  }

  // run(pool) with three helpers.
  static void with_threads(const std::function<void(const ThreadPool&)>& run) {
    std::vector<std::thread> threads;
    run(ThreadPool{3, [&](std::function<void()> task) { threads.emplace_back(std::move(task)); }});
    for (std::thread& t : threads) t.join();
  }

  std::mt19937_64 random_;
  bool in_order_ = false;  // the limits of a row's ranges
  std::list<Guarded> memory_;
  ViewNames names_;  // of the views that make() is called with
};

// main of a driver: random calls [seed, seed + count) of a Case.
template <class Case>
int drive(int argc, char** argv, long usual_count) {
  if (__sanitizer_set_death_callback) {
    __sanitizer_set_death_callback([] { std::fprintf(stderr, "in call %s\n", current_call.c_str()); });
  }
  name_faults();
  setlinebuf(stdout);
  const long count = argc > 1 ? std::atol(argv[1]) : usual_count, seed = argc > 2 ? std::atol(argv[2]) : 0;
  try {
    std::printf("%s: seeds %ld to %ld\n", backend::name().c_str(), seed, seed + count - 1);
  } catch (const std::exception& e) {
    std::printf("skipped: %s\n", e.what());
    return 0;
  }
  for (long i = seed; i < seed + count; ++i) {
    current_call = std::to_string(i);
    Case one(static_cast<uint64_t>(i));
    current_call = std::to_string(i) + " " + one.text();
    if (std::getenv("JAX_FLASH_GUARD_VERBOSE")) std::printf("%s\n", current_call.c_str());
    try {
      one.run();
    } catch (const std::exception& e) {
      fail(e.what());
    }
  }
  current_call = "all";
  try {
    std::printf("%ld calls: %s\n", count, backend::summary().c_str());
  } catch (const std::exception& e) {
    fail(e.what());
  }
  return 0;
}

}  // namespace jax_flash
