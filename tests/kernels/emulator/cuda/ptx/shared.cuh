// csrc/cuda/ptx/shared.cuh on the emulator: a shared address is an offset.
#pragma once

#include "emulator.h"

namespace jax_flash::ptx {

inline uint8_t* dynamic_shared() { return emulator::shared; }
inline uint8_t* dynamic_shared_1024() { return emulator::shared; }
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - emulator::shared);
}

inline uint32_t load_shared(uint32_t address) {
  uint32_t x;
  std::memcpy(&x, emulator::shared + address, 4);
  return x;
}

inline float load_shared_float(uint32_t address) { return __uint_as_float(load_shared(address)); }

inline void store_shared(uint32_t address, uint4 x) { std::memcpy(emulator::shared + address, &x, 16); }

}  // namespace jax_flash::ptx
