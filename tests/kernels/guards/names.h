// The views of a call by the names of its operands, so that a fault at a guard page can be told apart.
#pragma once

#include <map>

#include "core/problem.h"

namespace jax_flash {

using ViewNames = std::map<const View*, const char*>;

inline ViewNames names_of(const Problem& of) {
  return {
#define JF_REQUIRED(name, ...) {&of.name, #name},
#define JF_OPTIONAL(id, name, ...) {&of.name, #name},
#include "operands.def"
#define JF_RESULT(name, ...) {&of.name, #name},
#define JF_LIKE(name, ...) {&of.name, #name},
#include "results.def"
  };
}

inline ViewNames names_of(const Tangents& of) {
  return {
#define JF_OPTIONAL_TANGENT(id, name, ...) {&of.name, #name},
#include "operands.def"
#define JF_TANGENT(name, ...) {&of.name, #name},
#include "results.def"
  };
}

inline ViewNames names_of(const AppendProblem& of) {
  return {
#define JF_APPEND_REQUIRED(name, ...) {&of.name, #name},
#define JF_APPEND_OPTIONAL(id, name, ...) {&of.name, #name},
#include "operands.def"
  };
}

}  // namespace jax_flash
