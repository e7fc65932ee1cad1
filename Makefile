# `make demo` and `make test` each make a virtual environment, install into it and do the whole thing.
# They need Python 3.11 or newer (with venv and headers), make and a C++20 compiler. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

find_python = $(shell for p in $(1); do $$p -c 'import sys; sys.exit(sys.version_info < (3, $(2)))' \
  >/dev/null 2>&1 && command -v $$p && break; done)

PYTHON ?= $(or $(call find_python,python3 python3.12 python3.11 python3.13 python3.14,11),python3)
PYTHON312 ?= $(call find_python,python3.12 $(sort $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3)),12)
EXTRAS ?= test,examples,bench,dev
IMPLEMENTATION ?= cpu
# IMPLEMENTATION=cuda takes an environment of its own, with jax's own CUDA wheels beside the library built here.
VENV ?= $(if $(filter cuda,$(IMPLEMENTATION)),.venv-gpu,.venv)
JAX ?= $(if $(filter cuda,$(IMPLEMENTATION)),jax[cuda13])
WORKERS ?= 2
TESTS ?= tests
PYTEST_ARGS ?=
DEMO_ARGS ?=
SERVE_ARGS ?=
BENCH_ARGS ?=
WERROR ?=

BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
# Python files are read from the tree (an editable install); only what is compiled or declared makes it stale.
SOURCES = pyproject.toml CMakeLists.txt $(shell find cmake csrc -type f)
CXX_FILES = $(shell find csrc tests tools -name '*.h' -o -name '*.cc' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
SHELL_FILES = .ci/run $(wildcard tools/*.sh)
PY_PATHS = $(wildcard jax_flash tests examples benchmarks tools)

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: demo
demo: $(INSTALLED)  ## train a byte-level language model on real text into out/, then serve it (DEMO_ARGS, SERVE_ARGS)
	$(BIN)/python examples/train_lm.py $(DEMO_ARGS)
	$(if $(filter -h --help,$(DEMO_ARGS)),,$(BIN)/python examples/generate.py $(SERVE_ARGS))

.PHONY: test
test: $(INSTALLED)  ## the test suite (IMPLEMENTATION=cuda on a GPU machine; WORKERS, TESTS, PYTEST_ARGS)
	JAX_FLASH_TEST_IMPLEMENTATION=$(IMPLEMENTATION) $(BIN)/python -m pytest -q -n $(WORKERS) $(PYTEST_ARGS) $(TESTS)

.PHONY: test-newest
test-newest:  ## the suite on Python 3.12 with the newest jax (PYTHON312=…)
	@test -n "$(PYTHON312)" || { echo "test-newest: no python3.12 found; name one with PYTHON312=…" >&2; exit 1; }
	$(MAKE) test VENV=$(NEWEST) PYTHON=$(PYTHON312)
NEWEST = .venv-newest

# What a newer jax or Python can break: tracing, JAX's transformations, lowering, sharding and modes, the libraries
# beside jax, and the equations in jax.numpy. The kernels are the same there: the extension is built from the same
# source against the same FFI headers (pyproject.toml pins the jaxlib that they come from).
JAX_TESTS = $(patsubst %,tests/test_%.py,all_to_all any_mesh backends compilation_cache derivatives derivative_sharding \
  distributed dot_product dot_product_errors export flax flax_layers fresh_process lowering_errors manual_sharding \
  mean_flow modes paged_programs partly_manual ring_training sharded_vmap sharding transforms)

# One instruction set is enough for them, in an environment of its own.
.PHONY: test-newest-jax
test-newest-jax:  ## of test-newest the files that test JAX's part in the work rather than the kernels' numbers
	JAX_FLASH_CPU_ISAS=baseline $(MAKE) test-newest NEWEST=.venv-newest-jax TESTS="$(JAX_TESTS)"

# JAX's global modes that change how a call is traced: Python's integers beside lax.axis_index are int64 with x64, and
# arrays of different rank may not meet where ranks are not promoted. About one case of each promise.
X64_TESTS = $(patsubst %,tests/test_%,ring.py ring_sharding.py packed_ring.py whole_keys.py whole_queries.py sharding.py \
  sharded_vmap.py index_arrays.py paged_programs.py transforms.py all_to_all.py::test_every_option_at_once)
RANK_TESTS = $(patsubst %,tests/test_%,draft_mask.py::test_each_option_in_plain_jax \
  draft_mask.py::test_a_missing_page_counts_for_the_rows_that_see_a_key_there draft_mask.py::test_tangents \
  append_dynamic.py::test_with_rotary append_dynamic.py::test_a_page_that_grows_keeps_its_earlier_tokens \
  compat_kvcache.py::test_with_kvcache forward_mode.py::test_tangents_of_every_option \
  paged_gradients.py::test_gradients_in_plain_jax merge.py::test_gradients_flow_through_the_merge \
  ring.py::test_forward_mode packed_ring.py::test_packed_tokens_with_lengths_of_keys)

.PHONY: test-modes
test-modes: $(INSTALLED)  ## rings, sharding and vmap with JAX_ENABLE_X64; what plain JAX does with JAX_NUMPY_RANK_PROMOTION=raise
	JAX_ENABLE_X64=1 $(MAKE) test TESTS="$(X64_TESTS)" PYTEST_ARGS='-k "explicit or zigzag or nested or split"'
	JAX_NUMPY_RANK_PROMOTION=raise $(MAKE) test TESTS="$(RANK_TESTS)"

.PHONY: print-python312
print-python312:
	@echo "$(PYTHON312)"

.PHONY: models
models:  ## examples/models against transformers on tiny random checkpoints, in an environment of its own (MODELS_WRITE=1: records)
	JAX_FLASH_MODELS=1 $(if $(MODELS_WRITE),JAX_FLASH_WRITE_GOLDEN=1) $(MAKE) test VENV=.venv-models EXTRAS=test,models \
	  TESTS=tests/test_models_transformers.py WORKERS=$(if $(MODELS_WRITE),0,$(WORKERS)) PYTEST_ARGS="-W ignore"
MODELS_WRITE ?=

.PHONY: memory-safety
memory-safety:  ## the CPU kernels between guard pages, under address and undefined-behaviour sanitizers
	$(MAKE) -C tests/kernels/guards -j$(WORKERS)

# By hand and before a release: it builds and tests a copy of the tree once for each bug.
.PHONY: mutants
mutants: $(INSTALLED)  ## plants the bugs of tests/mutants: none may survive (ONLY=text, NEAREST=1, GPU=1, COPIES=2, docs/testing.md)
	$(BIN)/python -m pip install -q 'nanobind>=3.1,<4' cmake ninja
	$(BIN)/python tools/mutants.py --workers $(WORKERS) $(if $(ONLY),--only "$(ONLY)") $(if $(NEAREST),--nearest) \
	  $(if $(GPU),--gpu) $(if $(COPIES),--jobs $(COPIES))
ONLY ?=
NEAREST ?=
GPU ?=
COPIES ?=

.PHONY: cuda-compile
cuda-compile: $(INSTALLED)  ## where nvcc is: rows of every kernel family and pass compile, load and are listed (CUDA_ROWS=all)
	mkdir -p $(CUDA_BUILD)
	$(BIN)/python tools/sample_kernels.py >$(CUDA_BUILD)/sample.def
	cmake -S . -B $(CUDA_BUILD) -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DJAX_FLASH_MODULE=OFF -DJAX_FLASH_CUDA=ON \
	  -DJAX_FLASH_CUDA_ARCHS="$(CUDA_ARCHS)" -DJAX_FLASH_WERROR=$(if $(WERROR),ON,OFF) \
	  -DJAX_FLASH_KERNELS=$(if $(filter all,$(CUDA_ROWS)),,$(abspath $(CUDA_BUILD)/sample.def))
	cmake --build $(CUDA_BUILD) --parallel $(WORKERS)
	cmake --install $(CUDA_BUILD) --prefix $(CUDA_BUILD)/installed
	$(BIN)/python -c "from jax_flash import _core; _core.load_cuda('$(CUDA_BUILD)/installed/jax_flash/libjax_flash_cuda.so'); \
	  print('loads and lists', len(_core.cuda_kernels()), 'kernels')"
CUDA_BUILD = build/cuda-compile
# Empty: those of packages/release.json.
CUDA_ARCHS ?=
CUDA_ROWS ?= sample

.PHONY: cuda-emulate
cuda-emulate: $(INSTALLED)  ## the CUDA kernels' results on a host emulator (needs cmake, no GPU)
	$(BIN)/python tools/cuda_library.py --emulated
	cmake --build build/emulated --target cuda_units && build/emulated/cuda_units
	PYTHONPATH=tools:tests/kernels/emulator $(BIN)/python -m pytest -q -p emulated -n $(WORKERS) \
	  -k "not ($(NOT_EMULATED))" $(EMULATED_TESTS)
# What the emulator lacks, and cases that are large there and have smaller ones beside them.
NOT_EMULATED = xla or on_the_host or refused or many_long_sequences or many_sequences or 320-451 or \
  (matter_of_the_sequence and float32)
EMULATED_TESTS = tests/test_several_tiles.py tests/test_one_tile.py tests/test_segments.py tests/test_index_arrays.py tests/test_append.py tests/test_append_float8.py tests/test_paged.py \
  tests/test_decode_masks.py::test_rows_over_pages_see_their_blocks tests/test_decode_masks.py::test_arrays_over_contiguous_keys \
  tests/test_paged_splits.py tests/test_paged_gradients.py tests/test_transforms.py::test_nested_vmaps_map_different_arguments \
  tests/test_transforms.py::test_scan_is_the_loop 'tests/test_attention.py::test_a_call_repeated_gives_the_same_bits[True]' \
  tests/test_window_data.py::test_pages 'tests/test_window_data.py::test_every_pass_sees_the_window[cpu-small-any numbers-False]' \
  'tests/test_window_data.py::test_every_pass_sees_the_window[cpu-packed-a window and an offset-False]'

.PHONY: bench
bench: $(INSTALLED)  ## benchmarks with a report in out/bench (BENCH_ARGS=…)
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

.PHONY: wheels
wheels:  ## the release's wheels into dist/, checked and tried; fetches the CUDA toolkits (WHEELS="base cuda13")
	PYTHON="$(PYTHON)" PYTHON312="$(PYTHON312)" $(PYTHON) tools/build_wheels.py $(WHEELS)
	$(PYTHON) tools/check_wheels.py dist --any-glibc $(if $(WHEELS),--partial)
	$(PYTHON) tools/try_wheels.py dist $(if $(WHEELS),--partial)
WHEELS ?=

# By hand, weekly and before a release: it installs gigabytes, and other people's tests run for as long as they like.
.PHONY: libraries
libraries:  ## other libraries' own attention tests through our adapters, into docs/libraries.md (LIBRARIES="flax maxtext")
	@test -n "$(PYTHON312)" || { echo "libraries: no python3.12 found; name one with PYTHON312=…" >&2; exit 1; }
	$(PYTHON312) -m tools.libraries $(LIBRARIES)
LIBRARIES ?=

.PHONY: lint
lint: $(INSTALLED)  ## ruff, clang-format, mypy, shellcheck and zizmor, from pinned wheels
	$(BIN)/ruff check $(PY_PATHS)
	$(BIN)/ruff format --check $(PY_PATHS)
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy
	$(BIN)/shellcheck $(SHELL_FILES)
	$(BIN)/zizmor --offline --quiet .github

.PHONY: format
format: $(INSTALLED)  ## rewrite the files in the house's format
	$(BIN)/ruff check --fix --quiet $(PY_PATHS) || true
	$(BIN)/ruff format $(PY_PATHS)
	$(BIN)/clang-format -i $(CXX_FILES)

.PHONY: clean
clean:  ## remove what these targets made (out/ stays)
	rm -rf .venv .venv-newest .venv-newest-jax .venv-gpu build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One build directory per environment: an interrupted or second install compiles only what changed.
$(INSTALLED): $(SOURCES) | $(BIN)/python
	@echo "installing into $(VENV): the compiler and the package index take a few minutes"
	@$(BIN)/python -m pip install -q -e '.$(if $(EXTRAS),[$(EXTRAS)])' $(JAX:%='%') \
	  --config-settings=build-dir=build/$(notdir $(VENV)) \
	  $(if $(WERROR),--config-settings=cmake.define.JAX_FLASH_WERROR=ON)
	touch $@

define CHECK_PYTHON
import os, sys, sysconfig
def need(ok, line):
    if not ok: sys.exit(f"jax_flash: {line}")
need(sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}; name another with PYTHON=…")
try: import ensurepip, venv
except ImportError: need(False, f"{sys.executable} has no venv; install it (Debian, Ubuntu: apt install python3-venv) or name another with PYTHON=…")
need(os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")), f"{sys.executable} has no headers; install them (Debian, Ubuntu: apt install python3-dev) or name another with PYTHON=…")
endef
export CHECK_PYTHON

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "jax_flash: no $(PYTHON) found; name one with PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK_PYTHON"
	@command -v $(or $(firstword $(CXX)),c++) >/dev/null || { echo "jax_flash: no C++ compiler found; install g++" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
