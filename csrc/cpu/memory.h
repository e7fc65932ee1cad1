// Memory of the CPU passes.
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

// Large results and scratch are fresh memory in most calls, and to fault it in page by page takes a tenth of
// the time of some of them: asks for large pages where the range holds any whole.
inline void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(data), first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t end = (begin + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // may fail: a hint
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

// Memory of one call, kept for the next: fresh pages cost more than small problems do. The process keeps one
// block, of kKept floats at most; a call that finds it in use gets its own.
class KeptFloats {
 public:
  explicit KeptFloats(int64_t count) {
    {
      const std::lock_guard<std::mutex> lock(mutex());
      std::swap(block_, kept());
    }
    if (block_.count < count) {
      block_ = {};
      block_ = {aligned_floats(count), count};
    }
  }
  KeptFloats(const KeptFloats&) = delete;
  ~KeptFloats() {
    if (block_.count > kKept) return;
    const std::lock_guard<std::mutex> lock(mutex());
    if (block_.count > kept().count) std::swap(block_, kept());
  }

  float* get() const { return block_.memory.get(); }

 private:
  struct Block {
    Floats memory;
    int64_t count = 0;
  };
  static constexpr int64_t kKept = int64_t{1} << 23;

  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  static Block& kept() {
    static Block& one = *new Block;  // never destroyed: threads may outlive main
    return one;
  }

  Block block_;
};

}  // namespace jax_flash
