// Runs the passes for the drivers: backend_cpu.cc in place, backend_cuda.cc on copies in the GPU's memory.
// backend_plan.cc only plans them, for a GPU that need not be there.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <string>

#include "core/plan/row.h"
#include "core/problem.h"
#include "cpu/parallel.h"

namespace jax_flash::backend {

std::string name();  // the instruction set or the GPU; throws if there is none

bool sparing();  // launches are expensive, so cases are small and run once

int32_t width(int32_t any);                             // the supported head dim for a random one
bool repeatable(const AttentionSpec& spec, Pass pass);  // every run gives the same bits

// The kernels behind one row of csrc/kernels.def.
enum class Variant {
#define JF_SCORE(kind, ...) k##kind,
#include "scores.def"
  kCluster,  // plain, in 2-CTA clusters
  kDeterministic,
  kGeneralDeterministic,
  kFloat8,
  kSplit,  // decode without options, whose partial results are combined
  kFloat8Split,
  kFloat8General  // decode of float8 with options
};

// The properties that a case needs to run a given kernel.
struct Aim {
  Pass pass;
  DType dtype;
  int32_t head_dim, value_dim;  // at most
  int32_t block_m;
  int32_t most_rows;  // of queries and of keys; 0: any number
  bool latent;        // V is the first columns of K
  Variant variant;

  // The only score options allowed are the kernel's own.
  bool plain() const {
    return variant == Variant::kPlain || variant == Variant::kCluster || variant == Variant::kDropout ||
           variant == Variant::kDeterministic || variant == Variant::kSplit ||
           variant == Variant::kFloat8Split || alone();
  }
  bool alone() const {
    constexpr Variant kNone[] = {Variant::kPlain, Variant::kGeneral, Variant::kGeneralDropout,
                                 Variant::kDropout};
    return variant < Variant::kCluster && std::ranges::find(kNone, variant) == std::end(kNone);
  }
  bool is_one_of(std::initializer_list<Variant> all) const {
    return std::ranges::find(all, variant) != all.end();
  }
  bool dropout() const {
    return is_one_of(
        {Variant::kDropout, Variant::kGeneralDropout, Variant::kMaskDropout, Variant::kBiasDropout});
  }
  bool float8() const {
    return variant == Variant::kFloat8 || variant == Variant::kFloat8Split ||
           variant == Variant::kFloat8General;
  }
  bool deterministic() const {
    return variant == Variant::kDeterministic || variant == Variant::kGeneralDeterministic ||
           variant == Variant::kMask;  // without, ListedMask runs most masks
  }
  bool mask() const {
    return is_one_of({Variant::kMask, Variant::kListedMask, Variant::kMaskDropout, Variant::kBiasMask});
  }
  bool bias() const { return is_one_of({Variant::kBias, Variant::kBiasMask, Variant::kBiasDropout}); }
};

// Chooses which kernel of these passes and this loader the following calls of run() must reach. Three of four
// turns target a kernel each. Every fourth turn targets none, and on the CPU no turn does.
std::optional<Aim> aim(int64_t turn, Loader loader, std::initializer_list<Pass> passes);

// Whether the targeted kernel runs a call. Everything about the call is known except the operands' memory.
bool takes(const Problem& problem);

// Sizes and options of a call that the targeted kernel runs.
Problem example();
std::string aimed();

// Whether run() leaves results; else calls are only planned.
bool computes();

// `tangents`: of the tangent pass. False where no kernel was built for the call. With helpers in the `pool` a
// GPU runs the call twice concurrently, from two threads, each with its own stream.
bool run(Pass pass, const Problem& problem, const ThreadPool& pool, const Tangents* tangents = nullptr);

bool append(const AppendProblem& problem, const ThreadPool& pool);

std::string summary();  // of the calls so far; throws if a kernel was not reached or memory was not checked

}  // namespace jax_flash::backend
