// The FFI handlers of libjax_flash_cuda.so, and its other exports (csrc/ffi/library.h), without Python.
#include <cuda_runtime_api.h>

#include <map>
#include <utility>
#include <vector>

#include "core/plan/plan.h"
#include "core/plan/text.h"
#include "cuda/append/append.h"
#include "cuda/delta.h"
#include "cuda/device.h"
#include "cuda/registry.h"
#include "ffi/library.h"
#include "ffi/operands.h"

#define JF_EXPORT extern "C" __attribute__((visibility("default")))

namespace jax_flash {
namespace {

ffi::Error cuda_error(const char* what, cudaError_t status) {
  return ffi::Error::Internal(std::string("jax_flash: ") + what + ": " + cudaGetErrorString(status));
}

// Devices do not change, so each thread queries a device once.
cudaError_t current_device(Device& device) {
  thread_local std::map<int, Device> known;
  int ordinal = 0;
  if (cudaError_t e = cudaGetDevice(&ordinal); e != cudaSuccess) return e;
  const auto [at, is_new] = known.try_emplace(ordinal);
  if (is_new) {
    if (cudaError_t e = ask_device(ordinal, at->second); e != cudaSuccess) {
      known.erase(at);
      return e;
    }
  }
  device = at->second;
  return cudaSuccess;
}

// Programs make the same few calls again and again, so each thread keeps the plans of its last ones.
template <Pass pass>
const PlannedCall& plan_of(const AttentionSpec& spec, const Shapes& shapes, const Device& device) {
  constexpr size_t kMost = 16;
  struct Kept {
    AttentionSpec spec;
    Shapes shapes;
    Device device;
    PlannedCall plan;
  };
  thread_local std::vector<Kept> last;
  thread_local size_t oldest = 0;
  for (const Kept& kept : last) {
    if (kept.shapes == shapes && kept.spec == spec && kept.device == device) return kept.plan;
  }
  Kept planned{spec, shapes, device, plan({pass, spec, shapes, device}, built_kernels())};
  if (last.size() < kMost) return last.emplace_back(std::move(planned)).plan;
  return (last[oldest++ % kMost] = std::move(planned)).plan;
}

// Plans a call and launches its kernels. The workspace is the last result.
template <Pass pass>
ffi::Error run(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets, AttentionSpec spec) {
  Problem p{};
  Tangents tangents{};
  if (ffi::Error e = decode_operands(pass, spec, args, rets, p, tangents); e.failure()) return e;
  auto workspace = rets.get<ffi::AnyBuffer>(schema::count_results(pass, spec));
  if (!workspace) return workspace.error();
  Device device;
  if (cudaError_t e = current_device(device); e != cudaSuccess) return cuda_error("device", e);
  const Shapes shapes = shapes_of(p);
  const PlannedCall& chosen = plan_of<pass>(p.spec, shapes, device);
  if (chosen.kernel < 0) return ffi::Error::InvalidArgument(chosen.error);
  if (static_cast<int64_t>((*workspace)->size_bytes()) < chosen.workspace) {
    return ffi::Error::InvalidArgument("jax_flash: the call's workspace is smaller than its plan's");
  }
  void* memory = (*workspace)->untyped_data();
  if (p.row_max) {  // kernels take atomic maxima of it, so it is cleared; it follows out and lse
    const ffi::AnyBuffer row_max = **rets.get<ffi::AnyBuffer>(2);
    if (cudaError_t e = cudaMemsetAsync(p.row_max.data, 0, row_max.size_bytes(), stream); e != cudaSuccess) {
      return cuda_error("row_max", e);
    }
  }
  if (cudaError_t e = launch_schedules(p, chosen, memory, stream); e != cudaSuccess) {
    return cuda_error("schedule", e);
  }
  for (int32_t kernel : {chosen.decode_kernel, chosen.kernel}) {
    if (kernel < 0) continue;
    if (cudaError_t e = launch_of(kernel)(p, &tangents, chosen, memory, stream); e != cudaSuccess) {
      return cuda_error(text_of(chosen, built_kernels()[kernel]).c_str(), e);
    }
  }
  return ffi::Error::Success();
}

// The results alias the operands unless XLA kept the operands; in that case they are first copied.
template <bool dynamic>
ffi::Error run_append(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
                      AppendSpec spec) {
  AppendProblem p;
  if (ffi::Error e = decode_append(spec, dynamic, args, rets, p); e.failure()) return e;
  for (int32_t i = 0; i < overwritten(dynamic); ++i) {
    const ffi::AnyBuffer before = *args.get<ffi::AnyBuffer>(i), after = **rets.get<ffi::AnyBuffer>(i);
    if (ffi::Error e = same_bytes(before, after); e.failure()) return e;
    if (before.untyped_data() == after.untyped_data() || before.size_bytes() == 0) continue;
    const cudaError_t e = cudaMemcpyAsync(after.untyped_data(), before.untyped_data(), before.size_bytes(),
                                          cudaMemcpyDeviceToDevice, stream);
    if (e != cudaSuccess) return cuda_error("copy of a pool", e);
  }
  if (is_float8(p.dtype) && (p.head_dim % 2 || p.value_dim % 2)) {
    return operand_error("key of a float8 dtype has the head dims " + std::to_string(p.head_dim) + " and " +
                         std::to_string(p.value_dim) + "; CUDA copies it in pairs, which needs even ones");
  }
  Device device;
  if (cudaError_t e = current_device(device); e != cudaSuccess) return cuda_error("device", e);
  if (cudaError_t e = launch_append(p, device, stream); e != cudaSuccess) {
    return cuda_error("append_kv", e);
  }
  return ffi::Error::Success();
}

// delta = rowsum(dO ∘ O): [..., s, h, dv] twice → [..., h, s].
ffi::Error run_delta(cudaStream_t stream, ffi::AnyBuffer out, ffi::AnyBuffer d_out,
                     ffi::Result<ffi::Buffer<ffi::F32>> delta) {
  const auto dims = out.dimensions();
  const auto type = out.element_type();
  const size_t rank = dims.size();
  if (rank < 3 || d_out.dimensions() != dims || d_out.element_type() != type ||
      delta->element_count() * dims[rank - 1] != out.element_count()) {
    return operand_error("delta has operands of shapes " + shape_text(dims) + " and " +
                         shape_text(d_out.dimensions()) + ", and a result of shape " +
                         shape_text(delta->dimensions()));
  }
  if (type != ffi::F16 && type != ffi::BF16 && type != ffi::F32)
    return operand_error("out has an element type that this call does not take");
  DeltaCall call{out.untyped_data(), d_out.untyped_data(), delta->typed_data()};
  call.dtype = type == ffi::F16 ? DType::kF16 : type == ffi::BF16 ? DType::kBF16 : DType::kF32;
  for (size_t i = 0; i + 3 < rank; ++i) call.entries *= dims[i];
  call.rows = dims[rank - 3], call.heads = dims[rank - 2], call.columns = dims[rank - 1];
  if (cudaError_t e = launch_delta(call, stream); e != cudaSuccess) return cuda_error("delta", e);
  return ffi::Error::Success();
}

template <class Spec>
auto binding() {
  return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().RemainingArgs().RemainingRets().Attr<Spec>(
      "spec");
}

}  // namespace
}  // namespace jax_flash

#define JF_HANDLER(symbol, Spec, ...)                                                         \
  JF_EXPORT XLA_FFI_Error* symbol(XLA_FFI_CallFrame* frame);                                  \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, (__VA_ARGS__), jax_flash::binding<jax_flash::Spec>(), \
                                {xla::ffi::Traits::kCmdBufferCompatible})

#define JF_PASS(id, ...) \
  JF_HANDLER(JaxFlash##id##Cuda, AttentionSpec, jax_flash::run<jax_flash::Pass::k##id>);
#define JF_APPEND_PASS(id, ...)              \
  JF_HANDLER(JaxFlash##id##Cuda, AppendSpec, \
             jax_flash::run_append<jax_flash::keeps_scales(jax_flash::schema::k##id)>);
#include "results.def"

JF_EXPORT XLA_FFI_Error* JaxFlashDeltaCuda(XLA_FFI_CallFrame* frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxFlashDeltaCuda, jax_flash::run_delta,
                              jax_flash::ffi::Ffi::Bind()
                                  .Ctx<jax_flash::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<jax_flash::ffi::AnyBuffer>()
                                  .Arg<jax_flash::ffi::AnyBuffer>()
                                  .Ret<jax_flash::ffi::Buffer<jax_flash::ffi::F32>>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

JF_EXPORT const char* jax_flash_version() { return JAX_FLASH_VERSION; }

JF_EXPORT const jax_flash::KernelRow* jax_flash_kernels(int32_t* count) {
  const auto rows = jax_flash::built_kernels();
  *count = static_cast<int32_t>(rows.size());
  return rows.data();
}
