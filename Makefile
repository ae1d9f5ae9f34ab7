# The commands a person types. Each makes its own environment in .venv on a fresh machine with Python >= 3.10 and a C++
# compiler; nvcc on the PATH adds the CUDA library. Options: PYTHON, CONVDIT_CUDA, TORCH_CUDA_ARCH_LIST, MAX_JOBS.
PYTHON ?= python3
VENV ?= .venv
export MAX_JOBS ?= 2
export OMP_WAIT_POLICY ?= PASSIVE
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml convdit/_version.py

.PHONY: help demo test bench lint clean
help:
	@echo "make demo      build, then FCMAE and DiT on real pictures; report in demo-report/report.html"
	@echo "make test      build with everything the tests need, run the tests"
	@echo "make bench     time operators and models against their rivals; results in benchmarks/results/"
	@echo "make lint      ruff"
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

bench: $(VENV)/.test
	$(BIN)/convdit bench --out benchmarks/results

lint: $(BIN)/python
	@$(BIN)/python -m pip install -q ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info convdit/*.so
