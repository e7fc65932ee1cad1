#include "backend.h"

#include "cpu/attention.h"

namespace jax_flash::backend {

std::string name() { return cpu_isa(); }

bool sparing() { return false; }

int32_t width(int32_t any) { return any; }

bool repeatable(const AttentionSpec&, Pass) { return true; }

std::optional<Aim> aim(int64_t, Loader, std::initializer_list<Pass>) { return std::nullopt; }

bool takes(const Problem&) { return true; }

Problem example() { return {}; }

std::string aimed() { return {}; }

bool computes() { return true; }

bool run(Pass pass, const Problem& problem, const ThreadPool& pool, const Tangents* tangents) {
  if (pass == Pass::kTangent) return cpu_tangent(problem, *tangents, pool), true;
  const auto kernel = pass == Pass::kForward    ? cpu_forward
                      : pass == Pass::kBackward ? cpu_backward
                                                : cpu_bias_gradient;
  kernel(problem, pool);
  return true;
}

bool append(const AppendProblem& problem, const ThreadPool& pool) {
  cpu_append(problem, pool);
  return true;
}

std::string summary() { return "nothing out of bounds, everything written"; }

}  // namespace jax_flash::backend
