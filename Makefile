# `make profile` and `make test` do their own set-up, from a bare checkout on; `make help` lists everything.
# Without a network and with a CUDA build of torch in $(PYTHON), that torch is used (scripts/setup.sh).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup profile bench gpu test test-all test-oldest test-integrations sanitize lint format clean

PYTHON ?= python3
PROFILE_ARGS ?=
BENCH_ARGS ?=
PART ?=
GPU_ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 2
SEED := $(or $(SEED),$(shell od -An -N3 -tu4 /dev/urandom | tr -d ' '))
# The other end of what pyproject.toml allows: its language differs from that of the Triton that is installed.
OLDEST_TRITON := triton==3.6.0
# The same of transformers, with the packages of which it wants older versions than the one that is installed.
OLDEST_TRANSFORMERS := transformers==5.17.0
WITH_OLDEST_TRANSFORMERS := huggingface-hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
# Its losses, which import torch alone, are tested beside ours.
OPEN_CLIP := open_clip_torch==3.3.0
# Packages that call our functions or whose classes we replace, in a folder of their own; the versions stand there alone.
INTEGRATIONS := tests/integrations/requirements.txt
# The version that takes the newest `kernels` there is; those after it want one that is not released yet.
KERNELS_TRANSFORMERS := transformers==5.21.0
SMOKE_ARGS := --size tiny --tokens 8,16 --out build/smoke

# With a compiler and Python's headers, an extension that does not build is an error (setup.py); else Python parts do.
ifneq ($(shell command -v $(CXX) c++ clang++),)
ifneq ($(wildcard $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h),)
MMKERNELS_REQUIRE_EXT ?= 1
endif
endif
export PYTHON MMKERNELS_REQUIRE_EXT

BIN := .venv/bin
CSRC := $(shell find csrc -type f)
CXX_FILES := $(filter %.cpp %.h %.cu %.cuh,$(CSRC))

START := $(shell date +%s)
# $(call pytest,part,folder,tests): seconds of each file, seconds and runs of each op go to build/test-times/<part>.json.
pytest = $(BIN)/python -m pytest $(2) -m "$(3)$(FAST)" --times build/test-times/$(1).json $(DRAWN) $(PYTEST_ARGS)
# The tests' processes share the cores, so each computes with one thread.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
SHARED := -n $(WORKERS) --dist worksteal
heading = @printf '\n== %s\n' "$(1)"
finish = @printf '\n== make $@: done in %d s\n' $$(($$(date +%s) - $(START)))

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 26
	@echo '  PYTHON=python3.12 picks the Python; PROFILE_ARGS, BENCH_ARGS, GPU_ARGS, PYTEST_ARGS go to the commands.'
	@echo '  WORKERS=4 runs tests in so many processes; SEED=1 repeats what make test-all draws.'

setup: .venv/extension.stamp ## .venv with torch, all dependencies and the C++ extension; free the second time
	$(finish)

.venv/environment.stamp: pyproject.toml setup.py scripts/setup.sh
	@scripts/setup.sh
	@touch $@

# No stamp while the extension is missing: each `make` then tries again, in a second, and says why.
.venv/extension.stamp: .venv/environment.stamp CMakeLists.txt $(CSRC)
	$(call heading,C++ extension)
	@$(BIN)/python setup.py -q build_ext --inplace
	@test -e mmkernels/_cpu_why_not.txt || touch $@

profile: setup ## where the time of a Flamingo-style model goes, by number of visual tokens
	$(call heading,mmkernels profile flamingo)
	@$(BIN)/mmkernels profile flamingo $(PROFILE_ARGS)
	$(finish)

bench: setup ## the benchmarks
	$(call heading,mmkernels bench)
	@$(BIN)/mmkernels bench $(BENCH_ARGS)
	$(finish)

# No set-up first: where a CUDA torch is there already, its Python runs the checkout as it is, and nothing is installed.
gpu: ## build, test and measure all that needs a GPU, in eight minutes; PART=help lists the parts
	@scripts/gpu.sh $(if $(PART),"$(PART)") $(GPU_ARGS)
	$(finish)

define run_tests
	$(call heading,python -m mmkernels.aot $(AOT_ARGS): the GPU kernels compiled ahead of time)
	@$(BIN)/python -m mmkernels.aot $(AOT_ARGS)
	$(call heading,python -m mmkernels.aot --frontend with $(OLDEST_TRITON))
	@test -d .venv/$(OLDEST_TRITON) || $(BIN)/python -m pip --disable-pip-version-check install -qq --no-deps \
		--target .venv/$(OLDEST_TRITON) $(OLDEST_TRITON)
	@PYTHONPATH=$(abspath .venv)/$(OLDEST_TRITON) $(BIN)/python -m mmkernels.aot --frontend
	$(call heading,pytest tests $(DRAWN): not alone$(FAST))
	@test -d build/$(OPEN_CLIP) || $(BIN)/python -m pip --disable-pip-version-check install -qq --no-deps \
		--target build/$(OPEN_CLIP) $(OPEN_CLIP)
	@$(ONE_THREAD) $(call pytest,main,tests,not alone) $(SHARED)
	$(call heading,pytest tests $(DRAWN): alone$(FAST), with all threads)
	@$(call pytest,alone,tests,alone)
	$(call heading,pytest tests/ops $(DRAWN): interpreted$(FAST), the Triton kernels in an interpreter)
	@TRITON_INTERPRET=1 $(ONE_THREAD) $(call pytest,interpreted,tests/ops,interpreted) $(SHARED)
	$(call heading,smoke run: mmkernels profile flamingo)
	@$(BIN)/mmkernels profile flamingo $(SMOKE_ARGS)
	$(finish)
endef

test: FAST := $(empty) and not slow
test: setup lint ## lint, types, C++ build, unit tests, GPU kernels interpreted and compiled, a smoke run
	$(run_tests)

test-all: DRAWN := --seed $(SEED)
test-all: AOT_ARGS := --all
test-all: setup lint test-oldest test-integrations ## the same in full: every combination, every GPU target, inputs drawn with a new SEED
	$(run_tests)

test-oldest: setup ## what uses transformers, on the oldest version of it that pyproject.toml allows
	$(call heading,pytest with $(OLDEST_TRANSFORMERS))
	@test -d .venv/$(OLDEST_TRANSFORMERS) || $(BIN)/python -m pip --disable-pip-version-check install -qq --no-deps \
		--target .venv/$(OLDEST_TRANSFORMERS) $(OLDEST_TRANSFORMERS) $(WITH_OLDEST_TRANSFORMERS)
	@PYTHONPATH=$(abspath .venv)/$(OLDEST_TRANSFORMERS) $(ONE_THREAD) $(call pytest,oldest,tests/integrations tests/models \
		tests/test_transformers_version.py tests/test_guide.py tests/test_cli.py,not alone and not slow) $(SHARED)
	$(finish)

# Each without what it depends on: .venv has that, or the list names it.
test-integrations: setup build/integrations.stamp ## what runs within other packages: peft, TRL, diffusers, kernels, ...
	$(call heading,pytest tests/integrations tests/test_guide.py: with the packages of $(INTEGRATIONS))
	@PYTHONPATH=$(abspath build/integrations) $(ONE_THREAD) $(call pytest,integrations,tests/integrations tests/test_guide.py,integration) $(SHARED) -k "not hub"
	$(call heading,pytest tests/integrations/test_hub_kernel.py: with $(KERNELS_TRANSFORMERS))
	@test -d build/$(KERNELS_TRANSFORMERS) || $(BIN)/python -m pip --disable-pip-version-check install -qq --no-deps \
		--target build/$(KERNELS_TRANSFORMERS) $(KERNELS_TRANSFORMERS)
	@export PYTHONPATH=$(abspath build)/$(KERNELS_TRANSFORMERS):$(abspath build/integrations); \
		$(ONE_THREAD) $(call pytest,hub,tests/integrations/test_hub_kernel.py tests/test_guide.py,integration) -k hub
	$(finish)

build/integrations.stamp: $(INTEGRATIONS) | .venv/extension.stamp
	$(call heading,packages of $(INTEGRATIONS) in build/integrations)
	@rm -rf build/integrations
	@$(BIN)/python -m pip --disable-pip-version-check install -qq --no-deps --target build/integrations -r $(INTEGRATIONS)
	@touch $@

# Python itself is not instrumented, so the sanitizer's runtime comes first by hand, with the C++ runtime whose exceptions
# it watches; what it can't know of (leaks at exit, memory meters, code that torch compiles) is left out.
sanitize: setup ## the ops' tests on the CPU extension built with address and undefined-behaviour sanitizers
	$(call heading,CPU extension with sanitizers)
	@$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
		-DPython_EXECUTABLE=$(abspath $(BIN)/python) -DMMKERNELS_SANITIZE=ON >/dev/null
	@$(BIN)/cmake --build build/sanitize --target _cpu
	$(call heading,pytest tests/ops tests/test_host.py)
	@MMKERNELS_REQUIRE_EXT=1 LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
		ASAN_OPTIONS=detect_leaks=0 \
		MMKERNELS_CPU_EXTENSION=$$(ls $(abspath build/sanitize)/_cpu.*so) \
		$(BIN)/python -m pytest tests/ops tests/test_host.py -k "not memory and not inductor" $(PYTEST_ARGS)
	$(finish)

lint: setup ## ruff, mypy and clang-format, changing nothing
	$(call heading,ruff)
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	$(call heading,mypy)
	@$(BIN)/python -m mypy
	$(call heading,clang-format)
	@$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: setup ## let ruff and clang-format rewrite the sources
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .
	@$(BIN)/clang-format -i $(CXX_FILES)

clean: ## remove what builds and tests leave; .venv stays
	rm -rf build dist *.egg-info mmkernels/*.so mmkernels/*_why_not.txt .venv/*.stamp
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find benchmarks csrc examples mmkernels tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
