// Runs independent items on a thread pool that others share.
#pragma once

#include <cstdint>
#include <functional>

namespace jax_flash {

struct ThreadPool {
  int64_t threads = 1;                                       // of the pool, the caller not counted
  std::function<void(std::function<void()>)> schedule = {};  // runs a task some time, on any thread
};

// Calls body(i) once for every i in [0, count), on up to `workers` threads, and returns when all are done.
// The caller works too, so a pool whose threads are all busy, or that has one thread which is the caller's,
// is no deadlock. Rethrows the first exception that a body throws.
void parallel_for(const ThreadPool& pool, int64_t count, int64_t workers,
                  const std::function<void(int64_t)>& body);

}  // namespace jax_flash
