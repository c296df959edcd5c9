# The words a person types. Everything is made in $(VENV) and $(BUILD); nothing outside this folder is touched, except
# that a missing Debian package (python3-venv, catch2) is installed where apt and the rights for it are there.

VENV ?= .venv
BUILD ?= build
PYTHON ?= python3
TORCH ?= torch==2.11.0
DATA ?=
OUT ?= $(BUILD)/gpu-check
JOBS ?= $(or $(MAX_JOBS),$(shell nproc))
# CUDA kernels take minutes to compile, so a build for development has them only where a GPU runs them.
CUDA ?= $(if $(shell command -v nvidia-smi),AUTO,OFF)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

override PYTHON := $(or $(shell command -v $(PYTHON)),$(PYTHON))
override VENV := $(abspath $(VENV))
override BUILD := $(abspath $(BUILD))
REPORTS := $(BUILD)/reports
PY := $(VENV)/bin/python
ready := $(VENV)/.ready

export PATH := $(VENV)/bin:$(PATH)
export ELATTN_LIBRARY := $(BUILD)/libelattn.so

cpp_files = $(shell find csrc cuda tests examples benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
torch_dir = $$($(PY) -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
# Quiet, but for the last lines of the log when it fails.
configure = mkdir -p $(1) && cmake -S $(2) -B $(1) -G Ninja $(3) > $(1)/configure.log 2>&1 || { cat $(1)/configure.log >&2; exit 1; }
root_rights = [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null
# Tests go on after a failure; the summary decides.
numerical_tests := $(addprefix tests/python/test_,forward_oracle.py backward_oracle.py bitwise.py)
lower_capabilities := $(shell grep -q ' avx2 ' /proc/cpuinfo && echo default; grep -q ' avx512dq ' /proc/cpuinfo && echo avx2)
ctest = ctest --test-dir $(1) --output-on-failure --parallel $(JOBS) --output-junit $(REPORTS)/$(2).xml $(3)
emulation := cuda_emulation
# On the CUDA kernels: all tests of the operators in the fast build of the emulation, the edges in the builds that see
# every access to memory.
cuda_tests := $(addprefix tests/python/test_,cuda_kernels.py forward_oracle.py backward_oracle.py decay.py \
  padding_packing.py state.py adversarial.py properties.py gradcheck.py grouped_linear.py)
emulated = ELATTN_TEST_BACKEND=emulation ELATTN_LIBRARY=$(BUILD)/$(1)/libelattn.so OMP_NUM_THREADS=1 $(2) \
  $(PY) -m pytest -q -n $(JOBS) --junitxml=$(REPORTS)/$(3).xml

suites := cpp examples python package sanitize cuda

.PHONY: help demo library prefix examples catch2 test $(suites:%=test-%) bench bench-paper bench-detection gpu-check gpu-bench format check-format install clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16
	@echo "Variables: VENV=.venv BUILD=build PYTHON=python3 TORCH=torch==2.11.0 JOBS= DATA=any.txt (demo) OUT= (gpu-check)"

demo: library examples ## train a small language model, plot its loss, generate from Python and from C++
	$(PY) examples/demo.py $(if $(DATA),--data "$(DATA)") --out $(BUILD)/demo --generate-binary $(BUILD)/examples/generate

test: ## all tests, then one summary
	@rm -rf $(REPORTS)
	@$(MAKE) -k $(suites:%=test-%) || true
	@$(PY) tests/summary.py $(REPORTS) $(suites)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "elattn needs Python 3.10 or newer; name one with PYTHON=" >&2; exit 1; }
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
	  rm -rf $(VENV); \
	  if $(root_rights); then apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null && $(PYTHON) -m venv $(VENV); \
	  else $(PYTHON) -m virtualenv -q $(VENV); fi; } || \
	  { echo "Cannot create a virtual environment: install python3-venv (or virtualenv) and try again" >&2; exit 1; }

# The package is used where it lies: a path file names python/, and $(BUILD) holds the library.
$(ready): requirements-dev.txt Makefile | $(VENV)/bin/python
	@echo "Installing $(TORCH), torchvision and requirements-dev.txt into $(VENV)"
	@$(PY) -m pip install -q --disable-pip-version-check $(TORCH) torchvision
	@$(PY) -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@echo "$(CURDIR)/python" > $$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/elattn.pth
	@printf '#!%s\nimport sys\n\nfrom elattn.cli import main\n\nsys.exit(main())\n' $(PY) > $(VENV)/bin/elattn
	@chmod +x $(VENV)/bin/elattn
	@touch $@

library: $(ready)
	@$(call configure,$(BUILD),.,-DELATTN_TORCH_DIR="$(torch_dir)" -DELATTN_WITH_CUDA=$(CUDA) -DCMAKE_INSTALL_RPATH_USE_LINK_PATH=ON)
	@cmake --build $(BUILD) --target elattn --parallel $(JOBS)

prefix: library
	@cmake --install $(BUILD) --prefix $(BUILD)/prefix >/dev/null

examples: prefix
	@$(call configure,$(BUILD)/examples,examples/cpp,-Delattn_DIR=$(BUILD)/prefix/share/cmake/elattn -DELATTN_TORCH_DIR="$(torch_dir)")
	@cmake --build $(BUILD)/examples --parallel $(JOBS)

catch2: $(ready)
	@[ -e /usr/include/catch2 ] || [ -e /usr/local/include/catch2 ] || \
	  { $(root_rights) && apt-get update -qq && apt-get install -y -qq catch2 >/dev/null; } || echo "Catch2 will be fetched"

test-cpp: library catch2 ## the Catch2 tests
	@$(call configure,$(BUILD),.,-DELATTN_BUILD_TESTS=ON)
	@cmake --build $(BUILD) --target elattn_tests --parallel $(JOBS)
	@$(call ctest,$(BUILD),cpp,-E ^$(emulation))

test-cuda: library catch2 ## the CUDA kernels, executed on the CPU; what nvcc makes of them, where it is installed
	@$(call configure,$(BUILD),.,-DELATTN_EMULATE_CUDA=ON)
	@cmake --build $(BUILD) --parallel $(JOBS)
	@status=0; \
	$(call ctest,$(BUILD),cuda,-R ^$(emulation)) || status=1; \
	$(call emulated,$(emulation),,cuda-python) $(cuda_tests) || status=1; \
	$(call emulated,$(emulation)_checked,,cuda-checked) tests/python/test_cuda_kernels.py || status=1; \
	$(call emulated,$(emulation)_asan,LD_PRELOAD=$$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0,cuda-asan) \
	  tests/python/test_cuda_kernels.py || status=1; \
	$(PY) tests/cuda_gate/gate.py || status=1; \
	exit $$status

test-sanitize: $(ready) catch2 ## the Catch2 tests under the address and undefined-behaviour sanitizers
	@$(call configure,$(BUILD)/sanitize,.,-DELATTN_SANITIZE=ON -DELATTN_BUILD_TESTS=ON -DELATTN_WITH_CUDA=OFF -DELATTN_TORCH_DIR="$(torch_dir)")
	@cmake --build $(BUILD)/sanitize --parallel $(JOBS)
	@$(call ctest,$(BUILD)/sanitize,sanitize)

test-examples: examples ## the C++ examples, built against an installed prefix
	@$(call ctest,$(BUILD)/examples,examples)

# A process for each core, of one thread where a test does not ask for more.
test-python: library examples ## pytest; its numerical tests again on each lower instruction set of this machine
	@status=0; \
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --junitxml=$(REPORTS)/python.xml tests/python || status=1; \
	for capability in $(lower_capabilities); do \
	  echo "ATEN_CPU_CAPABILITY=$$capability"; \
	  ATEN_CPU_CAPABILITY=$$capability OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --junitxml=$(REPORTS)/python-$$capability.xml $(numerical_tests) || status=1; \
	done; exit $$status

test-package: library ## build the wheel; use it from another folder, in Python and by find_package
	@rm -rf $(BUILD)/wheel && mkdir -p $(BUILD)/wheel
	@ELATTN_BUILD_DIR=$(BUILD) ELATTN_WITH_CUDA=$(CUDA) $(PY) -m pip wheel -q --no-build-isolation --no-deps -w $(BUILD)/wheel .
	@$(PY) -m pip install -q --no-deps --target $(BUILD)/wheel/site $(BUILD)/wheel/*.whl
	@cd / && unset ELATTN_LIBRARY && export PYTHONPATH=$(BUILD)/wheel/site && \
	  prefix=$$($(PY) -c 'import elattn, torch; print(elattn.utils.cmake_prefix_path, torch.utils.cmake_prefix_path, sep=";")') && \
	  $(call configure,$(BUILD)/wheel/examples,$(CURDIR)/examples/cpp,-DCMAKE_PREFIX_PATH="$$prefix")
	@cmake --build $(BUILD)/wheel/examples --parallel $(JOBS)
	@$(call ctest,$(BUILD)/wheel/examples,package)

bench: library ## measure the operators, write $(BUILD)/bench
	$(PY) -m benchmarks.run --out $(BUILD)/bench

bench-paper: library ## answer the paper's questions by training and timing, write $(BUILD)/paper
	$(PY) -m benchmarks.paper all --out $(BUILD)/paper

bench-detection: library ## train and time the detector beside another one, hours, write $(BUILD)/detection
	$(PY) -m benchmarks.detection train --out $(BUILD)/detection
	$(PY) -m benchmarks.detection speed --out $(BUILD)/detection

gpu-check: ## build for the GPU of this machine, test and time it there, without a download; results in OUT
	@$(PYTHON) tests/gpu_check.py $(OUT) --build $(BUILD)/gpu --jobs $(JOBS)

gpu-bench: ## only build for the GPU and measure; results in OUT
	@$(PYTHON) tests/gpu_check.py $(OUT) --build $(BUILD)/gpu --jobs $(JOBS) --only build,bench

format: $(ready) ## format C++ and Python
	@clang-format -i $(cpp_files)
	@ruff format -q . && ruff check -q --fix .

check-format: $(ready) ## fail where `make format` would change something
	@clang-format --dry-run -Werror $(cpp_files)
	@ruff format --check -q . && ruff check -q .

install: ## pip install . into the environment of PYTHON
	$(PYTHON) -m pip install .

clean: ## remove $(BUILD); the virtual environment stays
	rm -rf $(BUILD)
