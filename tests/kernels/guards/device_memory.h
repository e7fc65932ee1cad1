// Copies of operands on the GPU, each in its own allocation.
//
// JAX_FLASH_GUARD chooses what surrounds them. "bands" (the default): bands of NaN, which must be unchanged
// afterwards. The others are for tools of compute-sanitizer, which know where each allocation ends. "none":
// nothing, for memcheck and synccheck. "fresh": nothing, and results and workspace are left uninitialised,
// for initcheck. "race": nothing; only small cases are tested, each is run once, because racecheck is slow.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/views.h"
#include "guarded.h"

namespace jax_flash::backend {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

enum class Guard { kBands, kNone, kFresh, kRace };

inline Guard guard() {
  const char* name = std::getenv("JAX_FLASH_GUARD");
  if (!name || !std::strcmp(name, "bands")) return Guard::kBands;
  if (!std::strcmp(name, "none")) return Guard::kNone;
  if (!std::strcmp(name, "fresh")) return Guard::kFresh;
  if (!std::strcmp(name, "race")) return Guard::kRace;
  throw std::runtime_error(std::string("JAX_FLASH_GUARD is ") + name + ", not bands, none, fresh or race");
}

// `bytes` of GPU memory between two bands, all filled with NaN unless guard() is kFresh.
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) : bytes_(bytes), band_(guard() == Guard::kBands ? kBand : 0) {
    check(cudaMalloc(&base_, total()), "cudaMalloc");
    if (guard() != Guard::kFresh) check(cudaMemset(base_, 0xFF, total()), "cudaMemset");
  }
  DeviceMemory(const DeviceMemory&) = delete;
  ~DeviceMemory() { cudaFree(base_); }

  char* data() const { return static_cast<char*>(base_) + band_; }
  // NaN in each of f16, bf16 and f32.
  void poison() { check(cudaMemset(data(), 0xFF, bytes_), "cudaMemset"); }
  void read_from(const void* host) {
    check(cudaMemcpy(data(), host, bytes_, cudaMemcpyHostToDevice), "copy to the GPU");
  }
  void write_to(void* host) const {
    check(cudaMemcpy(host, data(), bytes_, cudaMemcpyDeviceToHost), "copy from the GPU");
  }
  std::string bytes() const {
    std::string all(bytes_, '\0');
    write_to(all.data());
    return all;
  }

  void check_bands() const {
    if (!band_) return;
    std::vector<unsigned char> all(2 * band_);
    check(cudaMemcpy(all.data(), base_, band_, cudaMemcpyDeviceToHost), "copy from the GPU");
    check(cudaMemcpy(all.data() + band_, data() + bytes_, band_, cudaMemcpyDeviceToHost),
          "copy from the GPU");
    for (size_t i = 0; i < all.size(); ++i) {
      if (all[i] != 0xFF) {
        throw std::runtime_error("written outside an operand of " + std::to_string(bytes_) + " bytes, " +
                                 std::to_string(i % band_) + " bytes into the band " +
                                 (i < band_ ? "before" : "after") + " it");
      }
    }
  }

 private:
  static constexpr size_t kBand = 4096;

  size_t total() const { return bytes_ + 2 * band_ + (bytes_ + band_ == 0); }

  size_t bytes_, band_;
  void* base_ = nullptr;
};

// Copies of a problem's operands on the GPU; the problem's views are made to point to them. The host's values
// are copied for operands for which filled(operand) is true; the others are results.
class Copies {
 public:
  template <class AnyProblem, size_t n, class Filled>
  Copies(AnyProblem& p, View AnyProblem::* const (&operands)[n], Filled filled) {
    add(p, operands, filled);
  }
  template <class AnyProblem, size_t n, class Filled>
  void add(AnyProblem& p, View AnyProblem::* const (&operands)[n], Filled filled) {
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
  void poison(const void* host) {
    const auto at = by_host_.find(host);
    if (at != by_host_.end()) at->second.poison();
  }
  void write_back(void* host) const {
    const auto at = by_host_.find(host);
    if (at != by_host_.end()) at->second.write_to(host);
  }
  // Whether an operand has the same bytes in another copy of the problem.
  bool same(const Copies& other, const void* host) const {
    const auto at = by_host_.find(host);
    return at == by_host_.end() || at->second.bytes() == other.by_host_.at(host).bytes();
  }

 private:
  std::map<const void*, DeviceMemory> by_host_;
};

}  // namespace jax_flash::backend
