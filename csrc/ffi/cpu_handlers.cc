#include "cpu_handlers.h"

#include <exception>
#include <new>
#include <string>

#include "../cpu/attention.h"
#include "../cpu/kernels.h"
#include "operands.h"

namespace jax_flash {
namespace {

using Compute = void (*)(const Problem&, const ThreadPool&);

template <Pass pass, Compute compute>
ffi::Error handle(ffi::ThreadPool threads, AttentionSpec spec, ffi::RemainingArgs args,
                  ffi::RemainingRets rets) {
  Problem problem;
  if (ffi::Error error = decode_operands(pass, spec, args, rets, problem); error.failure()) return error;
  if (problem.head_dim > kMaxHeadDim || problem.value_dim > kMaxHeadDim) {
    return ffi::Error::InvalidArgument("jax_flash: head dims " + std::to_string(problem.head_dim) + " and " +
                                       std::to_string(problem.value_dim) + " exceed the CPU kernels' " +
                                       std::to_string(kMaxHeadDim));
  }
  try {
    compute(problem,
            {threads.num_threads(), [&](std::function<void()> task) { threads.Schedule(std::move(task)); }});
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "jax_flash: no memory for the CPU kernels' scratch");
  } catch (const std::exception& e) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition, e.what());
  }
  return ffi::Error::Success();
}

auto binding() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<AttentionSpec>("spec").RemainingArgs().RemainingRets();
}

}  // namespace
}  // namespace jax_flash

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxFlashForwardCpu,
                              (jax_flash::handle<jax_flash::Pass::kForward, jax_flash::cpu_forward>),
                              jax_flash::binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxFlashBackwardCpu,
                              (jax_flash::handle<jax_flash::Pass::kBackward, jax_flash::cpu_backward>),
                              jax_flash::binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JaxFlashBiasGradientCpu,
    (jax_flash::handle<jax_flash::Pass::kBiasGradient, jax_flash::cpu_bias_gradient>), jax_flash::binding());
