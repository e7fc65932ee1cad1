#undef _FORTIFY_SOURCE  // with this macro, longjmp takes a switch of stacks for an error
#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace emulator {

alignas(1024) uint8_t shared[kSharedBytes];

namespace {

constexpr size_t kStackBytes = 256 << 10;

struct Barrier {
  uint32_t size = 0, arrived = 0;
  uint64_t generation = 0;
  void* arguments[32] = {};
};

struct Copy {
  void* to;
  std::vector<uint8_t> bytes;
};

// Fibers live from block to block and switch by _setjmp, because swapcontext makes a system call each time.
struct Fiber {
  jmp_buf state;
  std::unique_ptr<uint8_t[]> stack;
  std::function<bool()> waits_for;
  bool done = false;
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
};

jmp_buf scheduler;
std::vector<Fiber> fibers;
std::vector<Barrier> warps;
Barrier block, groups[16];
uint32_t current;
const std::function<void()>* kernel;

void leave(Fiber& fiber) {
  if (_setjmp(fiber.state) == 0) _longjmp(scheduler, 1);
}

void enter() {
  for (;;) {
    (*kernel)();
    Fiber& fiber = fibers[current];
    fiber.done = true;
    leave(fiber);
  }
}

// Runs the fiber until it yields or ends. Must not be inlined: changed locals of the caller would be lost.
__attribute__((noinline)) void resume(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.stack) _longjmp(fiber.state, 1);
  fiber.stack = std::make_unique<uint8_t[]>(kStackBytes);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

void wait(const Barrier& barrier, uint64_t generation) {
  wait_until([&barrier, generation] { return barrier.generation != generation; });
}

// The calling fiber arrives at the barrier.
void arrive_and_wait(Barrier& barrier) {
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    wait(barrier, generation);
  }
}

void run_block(uint32_t threads) {
  for (size_t i = 0; i + 4 <= kSharedBytes; i += 4) std::memset(shared + i, 0xFF, 4);
  block = Barrier{threads};
  std::fill(std::begin(groups), std::end(groups), Barrier{});
  warps.assign(threads / 32, Barrier{32});
  for (uint32_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.done = false;
    fiber.waits_for = nullptr;
    fiber.uncommitted.clear();
    fiber.groups.clear();
  }
  for (uint32_t left = threads; left > 0;) {
    bool moved = false;
    for (uint32_t i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[i];
      if (fiber.done || (fiber.waits_for && !fiber.waits_for())) continue;
      fiber.waits_for = nullptr;
      current = i;
      threadIdx = dim3(i);
      resume(fiber);
      moved = true;
      left -= fiber.done;
    }
    if (!moved) {
      std::fprintf(stderr, "emulator: block %u hangs: its threads wait at different barriers\n", blockIdx.x);
      std::abort();
    }
  }
}

}  // namespace

void run(dim3 blocks, uint32_t threads, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  kernel = &body;
  gridDim = blocks, blockDim = dim3(threads);
  for (uint32_t y = 0; y < blocks.y; ++y) {
    for (uint32_t x = 0; x < blocks.x; ++x) {
      blockIdx = dim3(x, y);
      run_block(threads);
    }
  }
}

void block_barrier() { arrive_and_wait(block); }

void group_barrier(uint32_t number, uint32_t threads) {
  groups[number].size = threads;
  arrive_and_wait(groups[number]);
}

void wait_until(const std::function<bool()>& condition) {
  Fiber& self = fibers[current];
  if (condition()) return;
  self.waits_for = condition;
  leave(self);
}

bool block_any(bool condition) {
  static bool any[2];  // by generation: the next barrier may begin before everyone has read this one
  bool& result = any[block.generation % 2];
  if (block.arrived == 0) result = false;
  result |= condition;
  block_barrier();
  return result;
}

void warp_collective(void* argument, void (*all)(void* const (&)[32])) {
  Barrier& warp = warps[current / 32];
  const uint64_t generation = warp.generation;
  warp.arguments[current % 32] = argument;
  if (++warp.arrived == 32) {
    all(warp.arguments);
    warp.arrived = 0;
    ++warp.generation;
  } else {
    wait(warp, generation);
  }
}

void copy_later(void* to, const void* from, size_t bytes, size_t valid) {
  Copy copy{to, std::vector<uint8_t>(bytes, 0)};
  if (valid) std::memcpy(copy.bytes.data(), from, valid);
  std::memset(to, 0xFF, bytes);
  fibers[current].uncommitted.push_back(std::move(copy));
}

void commit_copies() {
  Fiber& self = fibers[current];
  self.groups.push_back(std::move(self.uncommitted));
  self.uncommitted.clear();
}

void wait_copies(int pending) {
  auto& groups = fibers[current].groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
    groups.pop_front();
  }
}

}  // namespace emulator
