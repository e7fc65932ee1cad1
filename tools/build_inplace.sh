#!/usr/bin/env bash
# Builds the extension into jax_flash/ of this checkout, for the Python named by PYTHON (default: python3).
# Needs nanobind, jaxlib, cmake and ninja in that Python or on PATH. Safe while others import the old build.
#   PYTHON=.venv/bin/python JAX_FLASH_CUDA=ON JAX_FLASH_CUDA_ARCHS=90a-real tools/build_inplace.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
PATH="$(dirname "$python"):$PATH"
tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
sabi=$("$python" -c 'import sys; print("Development.SABIModule" if sys.version_info >= (3, 12) else "")')
build=build/inplace-$tag

mkdir -p build
cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$python" -DSKBUILD_SABI_COMPONENT="$sabi" \
  -DJAX_FLASH_WERROR="${JAX_FLASH_WERROR:-ON}" --log-level=STATUS >"$build.log" 2>&1 ||
  { cat "$build.log"; exit 1; }
grep -E "^-- jax_flash|warning" "$build.log" || true
nice -n5 ninja -C "$build" -j"${JOBS:-2}"

# A rename replaces the file whole: a process that has the old one open keeps it.
for library in "$build"/_core*.so "$build"/libjax_flash_cuda.so; do
  [ -f "$library" ] || continue
  name=$(basename "$library")
  cp "$library" "jax_flash/.$name.tmp"
  mv -f "jax_flash/.$name.tmp" "jax_flash/$name"
  echo "jax_flash/$name"
done
