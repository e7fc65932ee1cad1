// The custom calls of platform "cpu".
#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* JaxFlashForwardCpu(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxFlashBackwardCpu(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxFlashBiasGradientCpu(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxFlashTangentCpu(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxFlashAppendCpu(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* JaxFlashAppendDynamicCpu(XLA_FFI_CallFrame* frame);
}
