# Everything can be repeated at no cost: each target does only what is missing.
SHELL := /bin/bash
PYTHON ?= $(firstword $(wildcard /usr/bin/python3) python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := pyproject.toml $(shell find guest host image-recipes -type f -not -name '*.pyc')
JOBS ?= 3

.PHONY: help demo test unit vm lab lint bench pot images man host clean
help:  ## List the targets.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

host:
	@image-recipes/host/setup

$(VENV)/bin/python: | host
	$(PYTHON) -m venv $(VENV)

# Installed, not linked: a link costs the launcher 10 ms at each start.
$(INSTALLED): $(SOURCES) | $(VENV)/bin/python
	@rm -rf build/lib build/bdist.*
	$(BIN)/pip install --quiet --disable-pip-version-check '.[dev]'
	@touch $@

pot: $(INSTALLED)  ## Build the pot: kernels and runtime (a quarter of an hour once).
	$(BIN)/apppot pot build

images: pot  ## Build the base images of the demo and the tests.
	$(BIN)/apppot image build debian-12
	$(BIN)/apppot image build hmmer
	$(BIN)/apppot image build debian-12-embedded

demo: images  ## Run a real job in a virtual machine.
	@PATH="$(CURDIR)/$(BIN):$$PATH" docs/demo/run

lint: $(INSTALLED)  ## mypy and ruff.
	$(BIN)/python -m pytest -q tests/lint

unit: $(INSTALLED)  ## Tests without a virtual machine: seconds.
	$(BIN)/python -m pytest -q -n $(JOBS) tests/lint tests/unit

vm: images  ## Tests in virtual machines.
	$(BIN)/python -m pytest -q -n $(JOBS) --durations=10 tests/vm

lab: images  ## The scenarios on real KVM and real Xen, inside QEMU.
	$(BIN)/python -m tests.lab

test: images  ## All tests; sets up what they need.
	$(BIN)/python -m pytest -n $(JOBS) --durations=10 tests

bench: images  ## Measure: a table, and build/bench.json.
	@mkdir -p build
	$(BIN)/python benchmarks/run.py --json build/bench.json

man: $(INSTALLED)  ## Write the manual pages to build/man.
	$(BIN)/python docs/make_man.py build/man

clean:  ## Remove what was made in this tree; pot and images stay.
	rm -rf build $(VENV) apppot.egg-info demo-job
