// csrc/cuda/ptx/cp_async.cuh on the emulator.
#pragma once

#include "emulator.h"

namespace jax_flash::ptx {

inline void cp_async_16(uint32_t shared, const void* global, bool valid) {
  emulator::copy_later(emulator::shared + shared, global, 16, valid ? 16 : 0);
}
inline void cp_async_16(uint32_t shared, const void* global) { cp_async_16(shared, global, true); }
struct L2Policy {};
inline L2Policy l2_policy(bool) { return {}; }
inline void cp_async_16(uint32_t shared, const void* global, L2Policy) { cp_async_16(shared, global, true); }
inline void cp_async_16(uint32_t shared, const void* global, bool valid, L2Policy) {
  cp_async_16(shared, global, valid);
}
inline void cp_async_4(uint32_t shared, const void* global, bool valid) {
  emulator::copy_later(emulator::shared + shared, global, 4, valid ? 4 : 0);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  emulator::wait_copies(kPending);
}

}  // namespace jax_flash::ptx
