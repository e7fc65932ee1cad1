#include "cpu_handlers.h"

#include <cstring>
#include <exception>
#include <functional>
#include <new>
#include <string>

#include "../cpu/attention.h"
#include "../cpu/kernels.h"
#include "../cpu/memory.h"
#include "operands.h"

namespace jax_flash {
namespace {

struct HeadDims {
  int32_t key, value;

  bool within(HeadDims most) const { return key <= most.key && value <= most.value; }
};
// The largest head dims of a call: of all passes, of the forward over latent pools, and of append's rows.
constexpr HeadDims kLargest{kMaxHeadDim, kMaxHeadDim}, kLargestLatent{kMaxLatentDim, kMaxHeadDim},
    kLargestRows{kMaxPoolColumns, kMaxHeadDim};

// Calls run(pool) and turns an exception into an error.
template <class Run>
ffi::Error guarded(ffi::ThreadPool& threads, HeadDims dims, HeadDims most, Run run) {
  if (!dims.within(kLargest) && !dims.within(most)) {
    return ffi::Error::InvalidArgument("jax_flash: head dims " + std::to_string(dims.key) + " and " +
                                       std::to_string(dims.value) + " exceed the CPU kernels' " +
                                       std::to_string(most.key) + " and " + std::to_string(most.value));
  }
  try {
    run({threads.num_threads(), [&](std::function<void()> task) { threads.Schedule(std::move(task)); }});
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "jax_flash: no memory for the CPU kernels' scratch");
  } catch (const std::exception& e) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition, e.what());
  }
  return ffi::Error::Success();
}

// Asks the operating system for large pages for the results.
void prefer_large_results(ffi::RemainingRets rets) {
  for (size_t i = 0; i < rets.size(); ++i) {
    const ffi::AnyBuffer result = **rets.get<ffi::AnyBuffer>(i);
    prefer_large_pages(result.untyped_data(), static_cast<int64_t>(result.size_bytes()));
  }
}

template <Pass pass, auto compute>
ffi::Error handle(ffi::ThreadPool threads, AttentionSpec spec, ffi::RemainingArgs args,
                  ffi::RemainingRets rets) {
  Problem problem{};
  Tangents tangents{};
  if (ffi::Error e = decode_operands(pass, spec, args, rets, problem, tangents); e.failure()) return e;
  prefer_large_results(rets);
  return guarded(threads, {problem.head_dim, problem.value_dim},
                 pass == Pass::kForward && spec.shared_kv() ? kLargestLatent : kLargest,
                 [&](const ThreadPool& pool) {
                   if constexpr (pass == Pass::kTangent) {
                     compute(problem, tangents, pool);
                   } else {
                     compute(problem, pool);
                   }
                 });
}

// The results alias the operands unless XLA kept the operands; in that case they are first copied.
template <bool dynamic>
ffi::Error handle_append(ffi::ThreadPool threads, AppendSpec spec, ffi::RemainingArgs args,
                         ffi::RemainingRets rets) {
  AppendProblem problem;
  if (ffi::Error error = decode_append(spec, dynamic, args, rets, problem); error.failure()) return error;
  for (int32_t i = 0; i < overwritten(dynamic); ++i) {
    const ffi::AnyBuffer before = *args.get<ffi::AnyBuffer>(i), after = **rets.get<ffi::AnyBuffer>(i);
    if (ffi::Error error = same_bytes(before, after); error.failure()) return error;
    if (before.untyped_data() != after.untyped_data()) {
      std::memcpy(after.untyped_data(), before.untyped_data(), before.size_bytes());
    }
  }
  return guarded(threads, {problem.head_dim, problem.value_dim}, kLargestRows,
                 [&](const ThreadPool& pool) { cpu_append(problem, pool); });
}

template <class Spec>
auto binding() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<Spec>("spec").RemainingArgs().RemainingRets();
}

}  // namespace
}  // namespace jax_flash

#define JF_PASS(id, name, ...)                                                                      \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxFlash##id##Cpu,                                                  \
                                (jax_flash::handle<jax_flash::Pass::k##id, jax_flash::cpu_##name>), \
                                jax_flash::binding<jax_flash::AttentionSpec>());
#define JF_APPEND_PASS(id, name, ...)                                                                        \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxFlash##id##Cpu,                                                           \
                                jax_flash::handle_append<jax_flash::keeps_scales(jax_flash::schema::k##id)>, \
                                jax_flash::binding<jax_flash::AppendSpec>());
#include "../results.def"
