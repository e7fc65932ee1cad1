// The custom calls of platform "cpu".
#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" {
#define JF_PASS(id, ...) XLA_FFI_Error* JaxFlash##id##Cpu(XLA_FFI_CallFrame* frame);
#define JF_APPEND_PASS(id, ...) XLA_FFI_Error* JaxFlash##id##Cpu(XLA_FFI_CallFrame* frame);
#include "../results.def"
}
