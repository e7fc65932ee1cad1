// The emulator's version of this header is the same as that of cuda_runtime_api.h.
#pragma once

#include "cuda_runtime_api.h"
