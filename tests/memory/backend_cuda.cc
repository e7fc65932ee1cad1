// The CUDA kernels on copies of the operands, each in an allocation of its own.
//
// JAX_FLASH_GUARD tells what surrounds it: "bands" (the default) of NaN, which must come back unharmed;
// "none" for compute-sanitizer's memcheck, which knows each allocation's end; "fresh" as "none", with results
// and workspace left as they were allocated, for its initcheck.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>
#include <vector>

#include "backend.h"
#include "cuda/append/append.h"
#include "cuda/registry.h"
#include "guarded.h"

namespace jax_flash::backend {
namespace {

constexpr size_t kBand = 4096;
constexpr int32_t kSmallSharedMemory = 101'376;  // of sm_86, 89 and 120: reaches the rows with small tiles
constexpr View Problem::* kOperands[] = {&Problem::query,
                                         &Problem::key,
                                         &Problem::value,
                                         &Problem::out,
                                         &Problem::lse,
                                         &Problem::dout,
                                         &Problem::delta,
                                         &Problem::dquery,
                                         &Problem::dkey,
                                         &Problem::dvalue,
                                         &Problem::dbias,
                                         &Problem::cu_seqlens_q,
                                         &Problem::cu_seqlens_k,
                                         &Problem::q_lengths,
                                         &Problem::kv_lengths,
                                         &Problem::q_segment_ids,
                                         &Problem::kv_segment_ids,
                                         &Problem::mask,
                                         &Problem::bias,
                                         &Problem::alibi_slopes,
                                         &Problem::sinks,
                                         &Problem::dropout,
                                         &Problem::block_tables,
                                         &Problem::k_scale,
                                         &Problem::v_scale};

constexpr View AppendProblem::* kAppendOperands[] = {
    &AppendProblem::k_pages,    &AppendProblem::v_pages,      &AppendProblem::key,
    &AppendProblem::value,      &AppendProblem::block_tables, &AppendProblem::kv_lengths,
    &AppendProblem::cu_seqlens, &AppendProblem::cos,          &AppendProblem::sin,
    &AppendProblem::k_scale,    &AppendProblem::v_scale};

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

enum class Guard { kBands, kNone, kFresh };

Guard guard() {
  const char* name = std::getenv("JAX_FLASH_GUARD");
  if (!name || !std::strcmp(name, "bands")) return Guard::kBands;
  if (!std::strcmp(name, "none")) return Guard::kNone;
  if (!std::strcmp(name, "fresh")) return Guard::kFresh;
  throw std::runtime_error(std::string("JAX_FLASH_GUARD is ") + name + ", not bands, none or fresh");
}

// `bytes` of the GPU's memory, of NaN unless guard() is kFresh, between two bands of it.
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) : bytes_(bytes), band_(guard() == Guard::kBands ? kBand : 0) {
    check(cudaMalloc(&base_, total()), "cudaMalloc");
    if (guard() != Guard::kFresh) check(cudaMemset(base_, 0xFF, total()), "cudaMemset");
  }
  DeviceMemory(const DeviceMemory&) = delete;
  ~DeviceMemory() { cudaFree(base_); }

  char* data() const { return static_cast<char*>(base_) + band_; }
  void read_from(const void* host) {
    check(cudaMemcpy(data(), host, bytes_, cudaMemcpyHostToDevice), "copy to the GPU");
  }
  void write_to(void* host) {
    check(cudaMemcpy(host, data(), bytes_, cudaMemcpyDeviceToHost), "copy from the GPU");
  }

  void check_bands() const {
    if (!band_) return;
    std::vector<unsigned char> all(total());
    check(cudaMemcpy(all.data(), base_, total(), cudaMemcpyDeviceToHost), "copy from the GPU");
    for (size_t i = 0; i < band_; ++i) {
      if (all[i] != 0xFF || all[band_ + bytes_ + i] != 0xFF) {
        throw std::runtime_error("written outside an operand of " + std::to_string(bytes_) + " bytes, " +
                                 std::to_string(i) + " bytes into a band");
      }
    }
  }

 private:
  size_t total() const { return bytes_ + 2 * band_ + (bytes_ + band_ == 0); }

  size_t bytes_, band_;
  void* base_ = nullptr;
};

// The GPU's copies of a problem's operands, which its views then point to.
class Copies {
 public:
  template <class AnyProblem, size_t n, class Filled>
  Copies(AnyProblem& p, View AnyProblem::* const (&operands)[n], Filled filled) {
    for (View AnyProblem::* operand : operands) {
      View& view = p.*operand;
      const Guarded* host = view.data ? Guarded::find(view.data) : nullptr;
      if (!host) continue;
      const auto [at, made] = by_host_.try_emplace(view.data, host->bytes());
      if (made && filled(operand)) at->second.read_from(host->data());
      view.data = at->second.data();
    }
  }
  void check_bands() const {
    for (const auto& [host, copy] : by_host_) copy.check_bands();
  }
  void write_back(void* host) {
    const auto at = by_host_.find(host);
    if (at != by_host_.end()) at->second.write_to(host);
  }

 private:
  std::map<const void*, DeviceMemory> by_host_;
};

std::set<int32_t>& reached() {
  static std::set<int32_t> rows;
  return rows;
}
int64_t not_built = 0;

// The GPU; or one with less shared memory, for a third of the calls.
Device device(int32_t choice) {
  Device found{};
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "device");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "device");
  check(cudaDeviceGetAttribute(&found.sm_count, cudaDevAttrMultiProcessorCount, 0), "device");
  check(cudaDeviceGetAttribute(&found.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), "device");
  found.capability = major * 10 + minor;
  if (choice % 3 == 0) found.shared_memory = std::min(found.shared_memory, kSmallSharedMemory);
  return found;
}

bool is_result(Pass pass, View Problem::* operand) {
  switch (pass) {
    case Pass::kForward:
      return operand == &Problem::out || operand == &Problem::lse;
    case Pass::kBackward:
      return operand == &Problem::dquery || operand == &Problem::dkey || operand == &Problem::dvalue;
    default:
      return operand == &Problem::dbias;
  }
}

}  // namespace

std::string name() {
  const Device found = device(1);
  return "sm_" + std::to_string(found.capability);
}

int32_t width(int32_t any) { return (any + 7) / 8 * 8; }

bool repeatable(const AttentionSpec& spec, Pass pass) {
  return pass != Pass::kBackward || spec.deterministic;
}

bool run(Pass pass, const Problem& problem, const ThreadPool&) {
  const Device planned_for = device(problem.q_rows + problem.k_rows);
  const LaunchPlan chosen = plan(pass, problem.spec, shapes_of(problem), planned_for, built_kernels());
  if (chosen.kernel < 0) return ++not_built, false;
  Problem p = problem;
  Copies copies(p, kOperands, [&](View Problem::* operand) { return !is_result(pass, operand); });
  DeviceMemory workspace(chosen.workspace);
  check(launch_schedules(p, chosen, workspace.data(), nullptr), "schedule");
  for (int32_t kernel : {chosen.decode_kernel, chosen.kernel}) {
    if (kernel < 0) continue;
    reached().insert(kernel);
    check(launch_of(kernel)(p, chosen, workspace.data(), nullptr), "launch");
  }
  check(cudaDeviceSynchronize(), "kernel");
  workspace.check_bands();
  copies.check_bands();
  for (View Problem::* operand : kOperands) {
    if (is_result(pass, operand)) copies.write_back((problem.*operand).data);
  }
  return true;
}

bool append(const AppendProblem& problem, const ThreadPool&) {
  AppendProblem p = problem;
  Copies copies(p, kAppendOperands, [](auto) { return true; });
  check(launch_append(p, device(1).sm_count, nullptr), "launch");
  check(cudaDeviceSynchronize(), "kernel");
  copies.check_bands();
  copies.write_back(problem.k_pages.data);
  copies.write_back(problem.v_pages.data);
  return true;
}

std::string summary() {
  const auto rows = built_kernels();
  std::set<Pass> passes;  // that this driver runs
  for (int32_t i : reached()) passes.insert(rows[i].pass);
  std::string missing;
  for (int32_t i = 0; i < static_cast<int32_t>(rows.size()); ++i) {
    const KernelRow& r = rows[i];
    if (reached().contains(i) || !passes.contains(r.pass)) continue;
    missing += " [pass " + std::to_string(static_cast<int>(r.pass)) + " d=" + std::to_string(r.head_dim) +
               " dv=" + std::to_string(r.value_dim) + " " + std::to_string(r.block_m) + "x" +
               std::to_string(r.block_n) + " dtypes " + std::to_string(r.dtypes) + "]";
  }
  if (!missing.empty()) throw std::runtime_error("kernels never reached:" + missing);
  return std::to_string(reached().size()) + " kernels reached, nothing out of bounds, everything written (" +
         std::to_string(not_built) + " calls have no kernel)";
}

}  // namespace jax_flash::backend
