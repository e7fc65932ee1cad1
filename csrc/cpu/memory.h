// Memory management of the CPU passes.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace jax_flash {

// Requests huge pages for the huge-page-aligned part of a range. Large results and scratch are fresh memory
// in most calls, and faulting them in by 4 KiB pages takes up to a tenth of a call's time.
inline void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(data), first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t end = (begin + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (first < end)
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // only a hint: failure is harmless
#endif
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float, Free>;

inline Floats aligned_floats(int64_t count) {
  if (count == 0) return {};
  Floats memory(static_cast<float*>(std::aligned_alloc(64, (count + 15) / 16 * 64)));
  if (!memory) throw std::bad_alloc();
  prefer_large_pages(memory.get(), count * 4);
  return memory;
}

// Memory of one call, returned to a process-wide cache for the next: faulting in fresh pages costs more
// than small problems do. The cache holds one block of at most kMaxCachedFloats; a call that finds it in use
// allocates its own.
class CachedFloats {
 public:
  explicit CachedFloats(int64_t count) {
    {
      const std::lock_guard<std::mutex> lock(mutex());
      std::swap(block_, cached());
    }
    if (block_.count < count) {
      block_ = {};
      block_ = {aligned_floats(count), count};
    }
  }
  CachedFloats(const CachedFloats&) = delete;
  ~CachedFloats() {
    if (block_.count > kMaxCachedFloats) return;
    const std::lock_guard<std::mutex> lock(mutex());
    if (block_.count > cached().count) std::swap(block_, cached());
  }

  float* get() const { return block_.memory.get(); }

 private:
  struct Block {
    Floats memory;
    int64_t count = 0;
  };
  static constexpr int64_t kMaxCachedFloats = int64_t{1} << 23;

  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  static Block& cached() {
    static Block& one = *new Block;  // never destroyed, because threads may outlive main
    return one;
  }

  Block block_;
};

}  // namespace jax_flash
