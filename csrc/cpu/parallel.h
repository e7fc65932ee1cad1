// Runs work items on a thread pool that other users share.
#pragma once

#include <cstdint>
#include <functional>

namespace jax_flash {

struct ThreadPool {
  int64_t threads = 1;                                       // threads of the pool; the caller is not counted
  std::function<void(std::function<void()>)> schedule = {};  // runs a task at some later time, on any thread
};

// Calls body(i) once for every i in [0, count), on up to `workers` threads, and returns when all calls are
// done. The caller works too, so that there is no deadlock when all threads of the pool are busy, or when
// its only thread is the caller. Rethrows the first exception that a body throws.
void parallel_for(const ThreadPool& pool, int64_t count, int64_t workers,
                  const std::function<void(int64_t)>& body);

}  // namespace jax_flash
