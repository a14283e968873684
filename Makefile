# Two commands are all a newcomer needs: `make demo` and `make test`. Both set up what they need first.
PYTHON := .venv/bin/python
READY := .venv/.ready
METAWORLD := .venv/.metaworld
# A process for each core, each with whole files: what a file sets up is set up once.
SPREAD := -n auto --maxprocesses=4 --dist=loadfile

.PHONY: help setup browser demo so100 metaworld test test-all finish test-next test-lerobot bench bench-gpu gpu-wheels lint format clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## / - /' | sort

setup: $(READY)  ## make .venv and install everything into it

$(READY): pyproject.toml examples/virtual_so100/pyproject.toml scripts/setup.sh
	sh scripts/setup.sh
	@touch $@

browser:  ## a Chromium for the tests that look at reports, if it can be installed
	@sh scripts/browser.sh

demo: setup  ## simulate an SO-100, record demonstrations, train π₀, evaluate it (ARGS='--help' for options)
	$(PYTHON) -m lerobot_env_virtual_so100.demo $(ARGS)

so100: setup  ## the way of a user with two arms, virtual ones: record, train, roll out (ARGS='--help' for options)
	$(PYTHON) -m lerobot_env_virtual_so100.so100 $(ARGS)

$(METAWORLD): $(READY) examples/metaworld/pyproject.toml
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -e examples/metaworld
	@touch $@

metaworld: setup $(METAWORLD)  ## MetaWorld's experts: record, train π₀ and ACT, evaluate (ARGS='--tasks=… --steps=…')
	$(PYTHON) -m lerobot_env_metaworld_small.learn $(ARGS)

test: setup  ## fast tests, on CPU, without network
	$(PYTHON) -m pytest $(SPREAD) $(ARGS)

test-all: setup browser $(METAWORLD)  ## slow tests too
	$(PYTHON) -m pytest -m '' $(ARGS)

finish: setup  ## the package from its wheel, in a bare environment, through all that a user does
	$(PYTHON) -m pytest -m '' -s tests/test_finish_line.py $(ARGS)

test-next: setup  ## fast tests with another LeRobot (LEROBOT=a clone of its repository)
	@test -d "$(LEROBOT)/src/lerobot" || { echo "LEROBOT=$(LEROBOT) is no clone of LeRobot's repository"; exit 2; }
	PYTHONPATH="$(abspath $(LEROBOT))/src" $(PYTHON) -m pytest $(SPREAD) $(ARGS)

test-lerobot: setup  ## LeRobot's own tests with this plugin in charge (LEROBOT=a clone of its repository)
	$(PYTHON) scripts/lerobot_tests.py "$(LEROBOT)" $(ARGS)

bench: setup  ## this policy beside LeRobot's built-in (ARGS='--size full')
	$(PYTHON) benchmarks/bench.py $(ARGS)

bench-gpu:  ## on a CUDA machine: correctness, speed and memory there, in outputs/gpu (ARGS='--seconds 600')
	$(or $(wildcard $(PYTHON)),python3) benchmarks/gpu.py $(ARGS)

gpu-wheels: setup  ## gather in outputs/wheels what a CUDA machine with PyTorch but without a network lacks
	sh scripts/gpu_wheels.sh outputs/wheels

lint: setup  ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: setup  ## let ruff format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean:  ## remove the environment and what runs have written
	rm -rf .venv outputs build dist *.egg-info
