# Two commands: `make bench` and `make test`. Each sets up everything it needs; the second run sets up nothing.
# A Python that already has torch (say, on a GPU machine with no registry) is used as it is; otherwise a
# virtual environment is made in $(VENV).
PY ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
TOOLS = setuptools wheel "pybind11>=2.13" "cmake>=3.24,<5" ninja

HAS_TORCH := $(shell $(PY) -c "import importlib.util as u; print(int(u.find_spec('torch') is not None))" 2>/dev/null)
ifeq ($(HAS_TORCH),1)
  PYTHON := $(PY)
else
  PYTHON := $(abspath $(VENV))/bin/python
  export PATH := $(abspath $(VENV))/bin:$(PATH)
endif

PIP = $(PYTHON) -m pip install -q --no-compile
hash = $(shell cat $(1) 2>/dev/null | sha256sum | cut -c1-16)
CUDA := $(if $(shell command -v nvcc 2>/dev/null),1,0)
SOURCES := $(sort $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh) CMakeLists.txt setup.py)
BUILD := $(call hash,$(SOURCES))
ENV_STAMP := .stamps/env-$(call hash,pyproject.toml)-$(TORCH)-$(HAS_TORCH)
CPU_STAMP := .stamps/cpu-$(BUILD)-$(HAS_TORCH)
CUDA_STAMP := .stamps/cuda$(CUDA)-$(BUILD)-$(HAS_TORCH)

.PHONY: help bench test ci lint format gpu env build build-cuda clean
help:
	@echo "make bench         measure every op and the I-JEPA step; SMOKE=1: under a minute"
	@echo "make test          every test: plain, Triton in its interpreter, kernels compiled with no GPU"
	@echo "make ci            lint, then make test"
	@echo "make gpu           GPU tests and benchmarks with the Python that is there; results in \$$OUT"
	@echo "make lint, format  ruff, mypy, clang-format"

env: $(ENV_STAMP)
$(ENV_STAMP):
	@command -v c++ >/dev/null || { echo "no C++ compiler: apt-get install -y g++"; exit 1; }
ifneq ($(HAS_TORCH),1)
	@$(PY) -c "import venv, ensurepip" 2>/dev/null || { echo "no venv module: apt-get install -y python3-venv"; exit 1; }
	$(PY) -m venv $(VENV)
	$(PIP) $(TOOLS)
	@echo "building jepa_kernels._C while torch is fetched"
	@JEPA_CUDA=0 $(PYTHON) setup.py -q build_ext --inplace & built=$$!; \
	$(PIP) $(TORCH) && $(PIP) --no-deps $(TRITON) && wait $$built
	$(PIP) --no-build-isolation --config-settings editable_mode=compat -e ".[train,bench,test,lint]"
	@mkdir -p .stamps; touch $(CPU_STAMP)
endif
	@mkdir -p .stamps; touch $@

build: $(ENV_STAMP)
	@test -e $(CPU_STAMP) -o -e $(CUDA_STAMP) || $(MAKE) --no-print-directory $(CPU_STAMP)
build-cuda: $(ENV_STAMP) $(CUDA_STAMP)
$(CPU_STAMP): | $(ENV_STAMP)
	JEPA_CUDA=0 $(PYTHON) setup.py -q build_ext --inplace
	@rm -f .stamps/cpu-* .stamps/cuda*; touch $@
$(CUDA_STAMP): | $(ENV_STAMP)
	@test $(CUDA) = 1 || echo "nvcc is not on PATH: the CUDA kernels are left out of this build"
	JEPA_CUDA=$(CUDA) $(PYTHON) setup.py -q build_ext --inplace
	@rm -f .stamps/cpu-* .stamps/cuda*; touch $@

bench: build
	$(PYTHON) -m benchmarks $(if $(SMOKE),--smoke) $(ARGS)

test: build-cuda
	$(PYTHON) -m tests $(ARGS)

ci: lint test

gpu: build-cuda
	$(PYTHON) -m benchmarks.gpu $(ARGS)

CPP := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
lint: env
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	clang-format --dry-run -Werror $(CPP)
format: env
	$(PYTHON) -m ruff check --fix -q .
	$(PYTHON) -m ruff format -q .
	clang-format -i $(CPP)

clean:
	rm -rf build .stamps bench-results jepa_kernels/_C*.so
