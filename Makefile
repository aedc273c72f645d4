# Every target sets itself up: on a fresh machine `make demo` or `make test` is the first command to run.
# Override what is built with: make PYTHON=python3.12, make VENV=/somewhere/else, make demo ARGS="--json".

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

PY := $(VENV)/bin/python
# The stamp is younger than everything the installation depends on, or the installation runs again.
STAMP := $(VENV)/.personafast-installed
SOURCES := pyproject.toml setup.py CMakeLists.txt .ci/constraints.txt \
  $(shell find csrc triton_kernels -type f -not -name '*.pyc' 2>/dev/null)
CPP := $(shell find csrc tests/csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

# The constraints also pin what pip puts into the isolated build environment: by the first name up to pip 25.2, by the
# second from 25.3 on.
export PIP_CONSTRAINT := $(CURDIR)/.ci/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Idle threads of torch (OpenMP) sleep: spinning ones take the cores from each other on small machines.
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false
# Where nvcc is, the installation compiles for one kind of GPU; `make test-all` does for all. Pip's own build, without
# this, does for all too.
export PERSONAFAST_CUDA_ARCHS ?= 90a

.DEFAULT_GOAL := help
CONFIGURE = $(VENV)/bin/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja -DPERSONAFAST_PYTHON=OFF

.PHONY: help install demo examples test test-triton test-cuda test-all cuda-all sanitize bench lint types format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): $(SOURCES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet torch
	$(PY) -m pip install --quiet --editable '.[dev]'
	touch $@

install: $(STAMP) ## Make .venv and install personafast into it, with everything tests and demo need

demo: $(STAMP) ## Compare every method on the built-in model
	$(PY) -m personafast demo $(ARGS)

examples: $(STAMP) ## Run the experiments on the zoo; write docs/examples.md
	mkdir -p benchmarks/results/examples build
	for name in tone chunk_size reference_swap steering masks; do \
	  $(PY) examples/$$name.py --json benchmarks/results/examples/$$name.json --plot build/$$name.png $(ARGS) || exit $$?; \
	done
	$(PY) examples/report.py

test: $(STAMP) test-triton test-cuda ## Run the tests that fit a small machine
	$(PY) -m pytest -m "not slow" --durations=10 $(ARGS)

test-triton: $(STAMP) ## Run the Triton kernels in Triton's interpreter, without a GPU
	TRITON_INTERPRET=1 $(PY) -m pytest tests/gpu_kernels/interpreted -m "not slow"

test-cuda: $(VENV)/bin/ninja ## Run the CUDA kernels as plain C++, without a GPU and without nvcc
	$(CONFIGURE) -B build/emulated -DPERSONAFAST_TESTS=ON -DPERSONAFAST_CUDA=OFF
	$(VENV)/bin/cmake --build build/emulated --target emulated
	$(VENV)/bin/ctest --test-dir build/emulated -R '^emulated_' --output-on-failure --no-tests=error

test-all: $(STAMP) sanitize cuda-all ## Run every test, those that train the zoo's models and the sanitizers included
	$(PY) -m pip install --quiet --editable '.[dev,zoo]'
	TRITON_INTERPRET=1 $(PY) -m pytest tests/gpu_kernels/interpreted
	$(PY) -m pytest --durations=10 $(ARGS)

# Neither torch nor the Python module is needed here, so this target needs no installation.
$(VENV)/bin/ninja:
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet cmake ninja

sanitize: sanitize-address sanitize-thread ## Run the C++ tests of the kernels under the sanitizers: address and undefined, then thread

sanitize-%: $(VENV)/bin/ninja
	$(CONFIGURE) -B build/sanitize-$* -DPERSONAFAST_SANITIZE=$* -DPERSONAFAST_TESTS=ON
	$(VENV)/bin/cmake --build build/sanitize-$*
	$(VENV)/bin/ctest --test-dir build/sanitize-$* --output-on-failure --no-tests=error -j $(shell getconf _NPROCESSORS_ONLN)

cuda-all: $(VENV)/bin/ninja ## Compile the CUDA kernels for every GPU, where there is nvcc: one that spills is an error
	if command -v $${CUDACXX:-nvcc} >/dev/null; then \
	  $(CONFIGURE) -B build/cuda-all -DPERSONAFAST_CUDA=ON -DPERSONAFAST_CUDA_STRICT=ON && \
	  $(VENV)/bin/cmake --build build/cuda-all --target personafast_cuda; \
	else \
	  echo 'no nvcc here: the CUDA kernels are not compiled'; \
	fi

bench: $(STAMP) ## Time every kernel and decoding beside named baselines; write docs/performance.md
	$(PY) -m pytest benchmarks --benchmark-quiet --bench-results benchmarks/results $(ARGS)
	$(PY) -m benchmarks.report

lint: $(STAMP) ## Check style and floors: ruff, clang-format, import-linter
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(if $(CPP),$(VENV)/bin/clang-format --dry-run --Werror $(CPP))
	$(VENV)/bin/lint-imports

types: $(STAMP) ## Check types: mypy
	$(PY) -m mypy

format: $(STAMP) ## Rewrite the sources in the house style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(if $(CPP),$(VENV)/bin/clang-format -i $(CPP))

clean: ## Remove what was built, the virtual environment included
	rm -rf $(VENV) build dist *.egg-info personafast/*.so .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
