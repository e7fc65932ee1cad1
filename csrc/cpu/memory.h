// Memory of the CPU passes.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

namespace jax_flash {

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float, Free>;

inline Floats aligned_floats(int64_t count) {
  if (count == 0) return {};
  Floats memory(static_cast<float*>(std::aligned_alloc(64, (count + 15) / 16 * 64)));
  if (!memory) throw std::bad_alloc();
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
