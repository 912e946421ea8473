# Two commands for a fresh machine: `make digits` and `make test`. Both make the environment .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --no-build-isolation -e

.PHONY: digits test lint docs sanitize build wheel clean

digits: $(VENV)/package  # train on scikit-learn's handwritten digits; nothing is downloaded but packages
	$(BIN)/alexnet-cuda train digits --output runs/digits --overwrite

test: $(VENV)/development
	ALEXNET_CUDA_REQUIRE=cpu,emulated $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/development
	PATH="$(CURDIR)/$(BIN):$$PATH" pre-commit run --all-files

docs: $(VENV)/development  # the site, in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f tools/mkdocs.yml

sanitize: $(VENV)/development  # the CPU operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	tools/sanitize.sh

build: $(VENV)/development  # after a change in csrc only what changed is compiled

wheel: $(VENV)/torch  # dist/*.whl for every Python, torch >= 2.11 and GPU, checked in fresh environments
	tools/wheel.sh $(BIN)/python
	tools/try_wheel.sh $(BIN)/python

$(VENV)/torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install "torch>=2.11" torchvision "scikit-build-core>=0.11" "pybind11>=2.13" "cmake>=3.24" ninja
	touch $@

# What a user needs: neither the emulator nor the packages for development.
$(VENV)/package: $(VENV)/torch pyproject.toml CMakeLists.txt $(wildcard csrc/* csrc/*/*)
	$(INSTALL) ".[train]" -C cmake.define.ALEXNET_CUDA_EMULATOR=OFF
	touch $@

$(VENV)/development: $(VENV)/package
	$(INSTALL) ".[dev]" -C cmake.define.ALEXNET_CUDA_EMULATOR=ON
	touch $@

clean:
	rm -rf $(VENV) build dist
