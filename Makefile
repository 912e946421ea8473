# Two commands for a fresh machine: `make digits` and `make test`. Both make the environment .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: digits test lint docs sanitize build clean

digits: $(VENV)/installed  # train on scikit-learn's handwritten digits; nothing is downloaded but packages
	$(BIN)/alexnet-cuda train digits --output runs/digits --overwrite

test: $(VENV)/installed
	ALEXNET_CUDA_REQUIRE=cpu,emulated $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" pre-commit run --all-files

docs: $(VENV)/installed  # the site, in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

sanitize: $(VENV)/installed  # the CPU operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	tools/sanitize.sh

build: $(VENV)/installed  # after a change in csrc only what changed is compiled

$(VENV)/installed: pyproject.toml CMakeLists.txt $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install "torch>=2.11" torchvision "scikit-build-core>=0.11" "pybind11>=2.13" "cmake>=3.24" ninja
	$(BIN)/pip install --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist
