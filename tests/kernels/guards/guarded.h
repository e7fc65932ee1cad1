// Memory that faults on the first byte outside it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

// `bytes` in pages of their own between two inaccessible pages, flush with the end or with the start.
class Guarded {
 public:
  Guarded(size_t bytes, bool at_end) : bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), inner = (bytes + page - 1) / page * page;
    length_ = inner + 2 * page;
    void* base = mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED ||
        (inner && mprotect(static_cast<char*>(base) + page, inner, PROT_READ | PROT_WRITE))) {
      std::perror("mmap");
      std::exit(2);
    }
    base_ = static_cast<char*>(base);
    data_ = base_ + page + (at_end ? inner - bytes : 0);
    page_ = page;
    live()[data_] = this;
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() {
    live().erase(data_);
    munmap(base_, length_);
  }

  // The allocation whose data begins there, or null.
  static const Guarded* find(const void* data) {
    const auto at = live().find(data);
    return at == live().end() ? nullptr : at->second;
  }

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

  // Where an address that faulted lies: "4 bytes past the end of key, …".
  static std::string describe(const void* address) {
    const auto* at = static_cast<const char*>(address);
    for (const auto& [data, memory] : live()) {
      if (at < memory->base_ || at >= memory->base_ + memory->length_) continue;
      const std::string whole =
          std::string(memory->name) + ", which has " + std::to_string(memory->bytes_) + " bytes";
      const char* const end = memory->data_ + memory->bytes_;
      if (at >= end) return std::to_string(at - end) + " bytes past the end of " + whole;
      if (at < memory->data_) return std::to_string(memory->data_ - at) + " bytes before " + whole;
      return "to byte " + std::to_string(at - memory->data_) + " of " + whole + " and is only to be read";
    }
    return "to no operand's memory";
  }

  const char* name = "an operand";

  // From now on writes fault too.
  void make_read_only() const {
    if (length_ > 2 * page_) mprotect(base_ + page_, length_ - 2 * page_, PROT_READ);
  }

  // NaN in each of f16, bf16 and f32.
  void poison() const { std::memset(data_, 0xFF, bytes_); }

 private:
  static std::map<const void*, const Guarded*>& live() {
    static std::map<const void*, const Guarded*> all;
    return all;
  }

  char *base_, *data_;
  size_t bytes_, length_, page_;
};
