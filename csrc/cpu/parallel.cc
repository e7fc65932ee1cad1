#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "progress.h"

namespace jax_flash {
namespace {

// State shared with the pool's tasks. A task that starts after the caller has returned finds no item left
// and touches nothing but this state.
struct Work {
  std::atomic<int64_t> next{0};
  int64_t count = 0;
  const std::function<void(int64_t)>* body = nullptr;
  std::mutex mutex;
  std::condition_variable finished;
  int64_t done = 0;
  std::exception_ptr error;

  void run() {
    int64_t mine = 0;
    std::exception_ptr thrown;
    for (int64_t i; (i = next.fetch_add(1)) < count; ++mine) {
      try {
        (*body)(i);
      } catch (...) {
        thrown = std::current_exception();
      }
    }
    if (mine == 0) return;
    const std::lock_guard<std::mutex> lock(mutex);
    done += mine;
    if (thrown && !error) error = thrown;
    if (done == count) finished.notify_all();
  }
};

}  // namespace

void wait_until(const int32_t* counter, int32_t value, const int32_t* abandoned) {
  for (int spins = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < value; ++spins) {
    if (__atomic_load_n(abandoned, __ATOMIC_ACQUIRE)) return;
    if (spins > 1000) std::this_thread::yield();
  }
}

void parallel_for(const ThreadPool& pool, int64_t count, int64_t workers,
                  const std::function<void(int64_t)>& body) {
  if (count <= 0) return;
  const auto work = std::make_shared<Work>();
  work->count = count;
  work->body = &body;
  const int64_t helpers = pool.schedule ? std::min({pool.threads, count, workers}) - 1 : 0;
  for (int64_t i = 0; i < helpers; ++i) pool.schedule([work] { work->run(); });
  work->run();
  std::unique_lock<std::mutex> lock(work->mutex);
  work->finished.wait(lock, [&] { return work->done == work->count; });
  if (work->error) std::rethrow_exception(work->error);
}

}  // namespace jax_flash
