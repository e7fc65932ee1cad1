// Where the drivers run the passes: backend_cpu.cc, or backend_cuda.cc on copies in the GPU's memory.
#pragma once

#include <initializer_list>
#include <optional>
#include <string>

#include "core/problem.h"
#include "cpu/parallel.h"

namespace jax_flash::backend {

std::string name();  // of the instruction set or the GPU; throws where there is none

bool sparing();  // whether launches are dear: cases are small, and run once

int32_t width(int32_t any);                             // a head dim that it takes
bool repeatable(const AttentionSpec& spec, Pass pass);  // the same bits at every run

// The kernels behind one row of csrc/kernels.def.
enum class Variant {
  kPlain,
  kPairs,  // plain, two blocks sharing copies
  kGeneral,
  kDropout,   // alone
  kAll,       // general, with dropout
  kSegments,  // alone, as those that follow
  kAlibi,
  kSoftcap,
  kBias,  // in tiles that the copy engine can bring
  kDeterministic,
  kGeneralDeterministic,
  kFloat8,
  kCut,  // decode whose parts another kernel joins
  kFloat8Cut
};

// What a case has to be for a kernel to run it.
struct Aim {
  Pass pass;
  DType dtype;
  int32_t head_dim, value_dim;  // at most
  int32_t block_m;
  Variant variant;

  // No option of the score but its own.
  bool plain() const {
    return variant == Variant::kPlain || variant == Variant::kPairs || variant == Variant::kDropout ||
           variant == Variant::kDeterministic || alone();
  }
  bool alone() const {
    return variant == Variant::kSegments || variant == Variant::kAlibi || variant == Variant::kSoftcap ||
           variant == Variant::kBias;
  }
  bool dropout() const { return variant == Variant::kDropout || variant == Variant::kAll; }
  bool float8() const { return variant == Variant::kFloat8 || variant == Variant::kFloat8Cut; }
  bool deterministic() const {
    return variant == Variant::kDeterministic || variant == Variant::kGeneralDeterministic;
  }
};

// The kernel whose turn it is: each of these passes' comes once in as many turns as there are, and a third;
// every fourth turn, and on the CPU every one, is of no kernel. Holds for the calls of run() that follow.
std::optional<Aim> aim(int64_t turn, std::initializer_list<Pass> passes);

// Whether the kernel aimed at takes a call, of which all but the operands' memory is known.
bool takes(const Aim& aim, const Problem& problem);

// False where no kernel was built for the call. With helpers in the `pool` the call runs twice at once on a
// GPU, from two threads on streams of their own.
bool run(Pass pass, const Problem& problem, const ThreadPool& pool);

bool append(const AppendProblem& problem, const ThreadPool& pool);

std::string summary();  // of the calls so far; throws where they left something unchecked

}  // namespace jax_flash::backend
