# The front door. `make demo` and `make test` work on a bare Debian 12: tools/setup.sh installs what is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help setup build install demo test test-cpp test-python test-sanitize fuzz test-engines test-eval test-arm bench check check-cuda format docs wheel wheels clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

setup: ## tools from Debian, .venv with what Python needs
	@PYTHON=$(PYTHON) tools/setup.sh

build: setup ## the library and the C++ tests, in build/release
	@cmake --preset release -Wno-dev > build-configure.log 2>&1 || (cat build-configure.log; exit 1); rm -f build-configure.log
	@cmake --build --preset release

install: setup ## the Python package into .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --config-settings=build-dir=build/wheel .
	@[ "$(MAKECMDGOALS)" != install ] || echo "flashprefill is in .venv. Next: make demo, $(BIN)/flashprefill --help, or docs/python.md for Python"

demo: install ## a real model reads a long prompt: dense against FlashPrefill (ARGS="--help" for options)
	@$(BIN)/flashprefill demo $(ARGS)

test: test-cpp test-python ## all tests that need no GPU

test-cpp: build
	@ctest --preset release

test-python: install
	@$(BIN)/python -W ignore::ResourceWarning -m pytest tests/python $(ARGS)

test-sanitize: setup ## the C++ tests under ASan + UBSan, and under TSan
	@tools/test_sanitize.sh

fuzz: setup ## libFuzzer on every fuzz target, a minute each (ARGS="600": that many seconds each)
	@tools/fuzz.sh $(ARGS)

test-engines: install ## the plugins inside vLLM, SGLang and llama.cpp, which are downloaded (ARGS="vllm": only that one)
	@tools/test_engines.sh $(ARGS)

test-eval: install ## flashprefill eval with lm-eval, which is downloaded (ARGS: for pytest)
	@tools/test_eval.sh $(ARGS)

test-arm: setup ## NEON: cross-compiled, a small matrix under qemu
	@tools/test_arm.sh

bench: install ## prefill against PyTorch's attention, table and JSON (ARGS="--help" for options)
	@$(BIN)/flashprefill bench $(ARGS)

check: setup ## formatting, linting and types
	@tools/check.sh

check-cuda: setup ## the CUDA kernels compiled for every GPU, none of which may spill that must not (needs nvcc, no GPU)
	@cmake -S . -B build/cuda -G Ninja -DCMAKE_BUILD_TYPE=Release -DFLASHPREFILL_CUDA=ON -Wno-dev > /dev/null
	@cmake --build build/cuda --target libflashprefill.so
	@$(BIN)/python tools/check_spills.py $(ARGS)

format: setup ## apply clang-format and ruff format
	@tools/check.sh --fix

docs: ## README and docs/ as a site, build/site/index.html; a link that leads nowhere is an error
	@PYTHON=$(PYTHON) tools/docs.sh

wheel: setup ## dist/*.whl, one for every Python from 3.10
	@$(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

wheels: ## dist/: sdist and manylinux wheels, as PyPI takes them (ARGS="cpu cuda aarch64 --twice": which, and whether twice)
	@PYTHON=$(PYTHON) tools/wheels.sh $(ARGS)

clean: ## builds, not .venv
	rm -rf build dist out
