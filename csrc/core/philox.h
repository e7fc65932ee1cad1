// Philox4x32-7, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
// (SC 2011). Seven rounds are the fewest with which they found it to pass every test.
#pragma once

#include <cstdint>

#include "spec.h"

namespace jax_flash {

struct PhiloxBlock {
  uint32_t word[4];
};

inline constexpr int kPhiloxRounds = 7;
inline constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
inline constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

// Replaces counters by random numbers. Several blocks are interleaved, because each round waits for the one
// before it.
template <int kCount>
JF_HD void philox(uint32_t key0, uint32_t key1, PhiloxBlock (&blocks)[kCount]) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (PhiloxBlock& block : blocks) {
      const uint64_t a = uint64_t{kPhiloxMultiplier0} * block.word[0];
      const uint64_t b = uint64_t{kPhiloxMultiplier1} * block.word[2];
      block = {{static_cast<uint32_t>(b >> 32) ^ block.word[1] ^ key0, static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ block.word[3] ^ key1, static_cast<uint32_t>(a)}};
    }
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
}

JF_HD PhiloxBlock philox(uint32_t key0, uint32_t key1, PhiloxBlock counter) {
  PhiloxBlock blocks[] = {counter};
  philox(key0, key1, blocks);
  return blocks[0];
}

}  // namespace jax_flash
