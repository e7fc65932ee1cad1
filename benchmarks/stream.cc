// A plain streaming read, the bound of what decoding can reach: the sum of an array's 32-bit words.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

typedef uint32_t Vector __attribute__((vector_size(64), aligned(4)));

// Several threads call this with one `next`, which starts at 0; each takes a chunk at a time.
extern "C" uint32_t stream_read(const uint32_t* x, size_t words, std::atomic<size_t>* next) {
  constexpr size_t kChunk = 1 << 20, kStep = 64;
  Vector sums[4] = {};
  uint32_t rest = 0;
  for (size_t begin; (begin = next->fetch_add(kChunk)) < words;) {
    const size_t end = std::min(words, begin + kChunk);
    size_t i = begin;
    for (; i + kStep <= end; i += kStep) {
      for (size_t j = 0; j < 4; ++j) sums[j] += *reinterpret_cast<const Vector*>(x + i + 16 * j);
    }
    for (; i < end; ++i) rest += x[i];
  }
  const Vector sum = sums[0] + sums[1] + sums[2] + sums[3];
  for (size_t j = 0; j < 16; ++j) rest += sum[j];
  return rest;
}
