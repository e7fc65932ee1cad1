// Runs the CUDA kernels on copies of the operands (device_memory.h).
#include <cuda_runtime_api.h>

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "backend.h"
#include "core/families/hopper_layout.h"
#include "core/schema.h"
#include "core/table.h"
#include "cuda/append/append.h"
#include "cuda/device.h"
#include "cuda/registry.h"
#include "device_memory.h"
#include "reach.h"

namespace jax_flash::backend {
namespace {

constexpr View Problem::* kOperands[] = {
#define JF_REQUIRED(name, ...) &Problem::name,
#define JF_OPTIONAL(id, name, ...) &Problem::name,
#include "operands.def"
#define JF_RESULT(name, ...) &Problem::name,
#define JF_LIKE(name, ...) &Problem::name,
#include "results.def"
};

constexpr View Tangents::* kTangents[] = {
#define JF_OPTIONAL_TANGENT(id, name, ...) &Tangents::name,
#include "operands.def"
#define JF_TANGENT(name, ...) &Tangents::name,
#include "results.def"
};

constexpr View AppendProblem::* kAppendOperands[] = {
#define JF_APPEND_REQUIRED(name, ...) &AppendProblem::name,
#define JF_APPEND_OPTIONAL(id, name, ...) &AppendProblem::name,
#include "operands.def"
};

// Whether the pass has a result whose row of the table satisfies `is`.
template <class Is>
bool any_result(Pass pass, Is is) {
  const auto& arrays = schema::arrays_of(pass);
  return std::any_of(arrays.results, arrays.results + arrays.result_count,
                     [&](const schema::Array* array) { return is(*array); });
}

bool is_result(Pass pass, View Problem::* operand) {
  return any_result(pass, [&](const schema::Array& array) { return array.view == operand; });
}

bool is_result(View Tangents::* operand) {
  return any_result(Pass::kTangent, [&](const schema::Array& array) { return array.tangent == operand; });
}

Device gpu() {
  Device found{};
  check(ask_device(0, found), "device");
  return found;
}

Reach& reach() {
  static Reach all(built_kernels(), gpu());
  return all;
}
int64_t not_built = 0, together = 0, overlapped = 0;

// A stream, and when its work began and ended.
class Stream {
 public:
  Stream() {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
    check(cudaEventCreate(&begin_), "event");
    check(cudaEventCreate(&end_), "event");
  }
  Stream(const Stream&) = delete;
  ~Stream() { cudaEventDestroy(begin_), cudaEventDestroy(end_), cudaStreamDestroy(stream_); }

  void run(const std::function<void(cudaStream_t)>& launch) {
    check(cudaEventRecord(begin_, stream_), "event");
    launch(stream_);
    check(cudaEventRecord(end_, stream_), "event");
  }
  // Both streams have ended.
  static bool overlap(const Stream& a, const Stream& b) {
    float a_to_b = 0, b_to_a = 0;
    check(cudaEventElapsedTime(&a_to_b, a.begin_, b.end_), "event");
    check(cudaEventElapsedTime(&b_to_a, b.begin_, a.end_), "event");
    return a_to_b > 0 && b_to_a > 0;
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

// Launches both functions a few times from two threads, each on its own stream.
void run_together(const std::function<void(cudaStream_t)>& one,
                  const std::function<void(cudaStream_t)>& other) {
  constexpr int kRepeats = 4;
  Stream streams[2];
  std::string error;
  const auto run = [&](Stream& stream, const std::function<void(cudaStream_t)>& launch) {
    stream.run([&](cudaStream_t s) {
      for (int i = 0; i < kRepeats; ++i) launch(s);
    });
  };
  std::thread thread([&] {
    try {
      run(streams[1], other);
    } catch (const std::exception& e) {
      error = e.what();
    }
  });
  run(streams[0], one);
  thread.join();
  if (!error.empty()) throw std::runtime_error(error);
  check(cudaDeviceSynchronize(), "kernel");
  ++together, overlapped += Stream::overlap(streams[0], streams[1]);
}

// initcheck does not see TMA stores, and so reports as unwritten the results of kernels that store o by TMA.
bool stores_by_tma(const LaunchPlan& plan) {
  const KernelRow& row = built_kernels()[plan.kernel];
  return row.pass == Pass::kForward && row.arch->family == &families::hopper &&
         hopper::forward_stores_by_tma(row);
}

// A call with its own copies of the operands and its own workspace.
class Call {
 public:
  Call(Pass pass, const Problem& problem, const Tangents& tangents, const LaunchPlan& plan)
      : p_(problem),
        t_(tangents),
        plan_(plan),
        copies_(p_, kOperands, [&](View Problem::* operand) { return !is_result(pass, operand); }),
        workspace_(plan.workspace) {
    copies_.add(t_, kTangents, [](View Tangents::* operand) { return !is_result(operand); });
    // For these kernels the driver finds unwritten elements itself, because they remain NaN.
    if (stores_by_tma(plan)) copies_.poison(problem.out.data);
    // Decode reads its counters before anybody has written them; a value without its mark counts as 0. The
    // pattern, which is no mark and a NaN as a number, keeps initcheck from reporting these loads.
    if (plan.decode.memory >= 0) check(cudaMemset(workspace_.data(), 0xFF, plan.workspace), "workspace");
  }

  void launch(cudaStream_t stream) {
    if (p_.row_max) {  // as the handler does
      const int64_t entries = p_.leading.count() * (p_.packed() ? 1 : p_.batch);
      const size_t bytes = static_cast<size_t>(entries * p_.heads * p_.q_rows) * sizeof(float);
      check(cudaMemsetAsync(p_.row_max.data, 0, bytes, stream), "row_max");
    }
    check(launch_schedules(p_, plan_, workspace_.data(), stream), "schedule");
    for (int32_t kernel : {plan_.decode_kernel, plan_.kernel}) {
      if (kernel >= 0) check(launch_of(kernel)(p_, &t_, plan_, workspace_.data(), stream), "launch");
    }
  }
  void check_bands() const { workspace_.check_bands(), copies_.check_bands(); }
  const Copies& copies() const { return copies_; }

 private:
  Problem p_;
  Tangents t_;
  const LaunchPlan& plan_;
  Copies copies_;
  DeviceMemory workspace_;
};

// A call of append_kv on operands of its own.
class AppendCall {
 public:
  explicit AppendCall(const AppendProblem& problem)
      : p_(problem), copies_(p_, kAppendOperands, [](auto) { return true; }) {}

  // Half of the calls have one SM, where warps have several tokens.
  void launch(cudaStream_t stream) {
    Device device = gpu();
    if (p_.q_rows % 2) device.sm_count = 1;
    check(launch_append(p_, device, stream), "launch");
  }
  void check_bands() const { copies_.check_bands(); }
  const Copies& copies() const { return copies_; }

 private:
  AppendProblem p_;
  Copies copies_;
};

// Runs make() once or, with helpers in the pool, two calls concurrently, whose results must have the same
// bits if the call is repeatable. `results`: the host memory that receives each result, and identifies it.
template <class Make>
void run_calls(const ThreadPool& pool, const std::vector<void*>& results, bool repeatable, Make make) {
  auto one = make();
  if (pool.schedule && guard() == Guard::kBands) {  // compute-sanitizer's tools need a single stream
    auto other = make();
    check(cudaDeviceSynchronize(), "copies");  // the calls' streams do not wait for the stream of the copies
    run_together([&](cudaStream_t s) { one.launch(s); }, [&](cudaStream_t s) { other.launch(s); });
    other.check_bands();
    for (void* host : results) {
      if (repeatable && !one.copies().same(other.copies(), host))
        throw std::runtime_error("two calls at once differ");
    }
  } else {
    one.launch(nullptr);
    check(cudaDeviceSynchronize(), "kernel");
  }
  one.check_bands();
  for (void* host : results) one.copies().write_back(host);
}

}  // namespace

std::string name() { return "sm_" + std::to_string(gpu().capability); }

bool sparing() { return guard() == Guard::kRace; }

int32_t width(int32_t any) { return (any + 7) / 8 * 8; }

bool repeatable(const AttentionSpec& spec, Pass pass) {
  return pass != Pass::kBackward || spec.deterministic;
}

std::optional<Aim> aim(int64_t turn, Loader loader, std::initializer_list<Pass> passes) {
  return reach().aim(turn, loader, passes);
}

bool takes(const Problem& problem) { return reach().takes(problem); }

Problem example() { return reach().example(); }

std::string aimed() { return reach().aimed(); }

bool computes() { return true; }

bool run(Pass pass, const Problem& problem, const ThreadPool& pool, const Tangents* tangents) {
  const LaunchPlan plan = reach().plan(pass, problem);
  if (plan.kernel < 0) return ++not_built, false;
  for (int32_t kernel : {plan.decode_kernel, plan.kernel}) {
    if (kernel >= 0) reach().note(plan, kernel, problem);
  }
  std::vector<void*> results;
  for (View Problem::* operand : kOperands) {
    if (is_result(pass, operand)) results.push_back((problem.*operand).data);
  }
  if (tangents) results.push_back(tangents->tout.data), results.push_back(tangents->tlse.data);
  run_calls(pool, results, repeatable(problem.spec, pass),
            [&] { return Call(pass, problem, tangents ? *tangents : Tangents{}, plan); });
  return true;
}

bool append(const AppendProblem& problem, const ThreadPool& pool) {
  const std::vector<void*> results{problem.k_pages.data, problem.v_pages.data};
  run_calls(pool, results, true, [&] { return AppendCall(problem); });
  return true;
}

std::string summary() {
  return "nothing out of bounds, everything written; " + std::to_string(overlapped) + " of " +
         std::to_string(together) + " calls from two threads overlapped; " + std::to_string(not_built) +
         " calls have no kernel\n" + reach().report();
}

}  // namespace jax_flash::backend
