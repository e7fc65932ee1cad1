// Which rows of csrc/kernels.def run a call: those that can, and the best of these.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "plan.h"

namespace jax_flash {

const char* name_of(Pass pass);

// Bytes of shared memory that a block of the row takes.
int64_t shared_memory(const KernelRow& row, DType dtype);

// The kernel of a row that a call takes.
ScoreKind score_kind(const KernelRow& row, const AttentionSpec& spec, const Shapes& shapes);

// Keys that a row of queries sees, at most and on average over packed sequences.
int64_t keys_in_sight(const AttentionSpec& spec, const Shapes& s);

// Whether rows of queries may see different numbers of keys, or sequences have different numbers of rows.
bool rows_differ(const AttentionSpec& spec);

// Query rows that read one KV head: of a sequence, or of a token where sequences are packed.
int64_t rows_of_group(const AttentionSpec& spec, const Shapes& s);

// Whether the keys' bytes, not the products, bound a call, and decode has all that it needs.
bool decodes(const AttentionSpec& spec, const Shapes& s);

// The best row of the pass; null: none runs the call.
const KernelRow* choose(Pass pass, const AttentionSpec& spec, const Shapes& shapes, const Device& device,
                        std::span<const KernelRow> built);

// The error then: names the rows of this pass and dtype that were built, each with its head dims once.
std::string no_kernel(Pass pass, const Shapes& shapes, const Device& device,
                      std::span<const KernelRow> built);

}  // namespace jax_flash
