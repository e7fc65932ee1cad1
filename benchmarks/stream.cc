// A plain streaming read, the bound of what decoding can reach: the sum of an array's 32-bit words.
#include <cstddef>
#include <cstdint>

extern "C" uint32_t stream_read(const uint32_t* x, size_t words) {
  uint32_t sum = 0;
  for (size_t i = 0; i < words; ++i) sum += x[i];
  return sum;
}
