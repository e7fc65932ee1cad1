#!/usr/bin/env bash
# The test suite on kernels that the driver assembles from PTX, as it does on cards newer than the library:
#   PYTHON=.venv-gpu/bin/python tools/gpu_ptx.sh 80 [arguments of pytest]
# Builds the extension into jax_flash/ of this checkout, with the PTX of that one architecture and no machine code.
set -euo pipefail
cd "$(dirname "$0")/.."
arch=${1:?usage: tools/gpu_ptx.sh ARCH [arguments of pytest]}
shift
python=$(command -v "${PYTHON:-python3}")
# What the driver assembled for one process serves the others.
export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-$PWD/build/ptx-cache} CUDA_CACHE_MAXSIZE=${CUDA_CACHE_MAXSIZE:-4294967296}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" JAX_FLASH_TEST_IMPLEMENTATION=cuda

PYTHON=$python JAX_FLASH_CUDA=ON JAX_FLASH_CUDA_ARCHS="$arch-virtual" tools/build_inplace.sh
library=jax_flash/libjax_flash_cuda.so
if cuobjdump --list-elf "$library" 2>/dev/null | grep -q "sm_"; then
  echo "gpu_ptx: $library holds machine code" >&2
  exit 1
fi
echo "gpu_ptx: $(cuobjdump --list-ptx "$library" | grep -c "sm_$arch") modules of PTX for sm_$arch, no machine code"

# The library's own error where the driver may not assemble: so what runs otherwise is what it assembled.
attempt='import jax, numpy as np, jax_flash
x = jax.device_put(np.zeros((1, 8, 1, 16), np.float16))
jax_flash.flash_attention(x, x, x, implementation="cuda").block_until_ready()'
if said=$(CUDA_DISABLE_PTX_JIT=1 "$python" -c "$attempt" 2>&1) || ! grep "jax_flash: .*PTX JIT" <<<"$said"; then
  echo "gpu_ptx: $library runs without the driver's assembler, or fails for another reason:" >&2
  echo "$said" >&2
  exit 1
fi
"$python" -m pytest -rfE --tb=short "$@"
