# Everything that is needed is installed by `make venv`, which all other targets depend on.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: venv train test test-long prometheus simtest cluster-demo lint types docs proto bench clean

# What is there may be of another Python than the one that is asked for by name.
venv: $(INSTALLED)
ifneq ($(origin PYTHON),file)
	@test "$$($(BIN)/python -V)" = "$$($(PYTHON) -V)" || \
		{ echo "$(VENV) isn't of $(PYTHON): name another folder, VENV=.venv-other"; exit 1; }
endif

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# On top of VENV, and with ray[default], whose Ray serves jobs and exports metrics. It also starts
# more processes each time, so all else does without.
RAY_DEFAULT := $(VENV)/ray-default

$(RAY_DEFAULT)/.installed: $(INSTALLED)
	$(BIN)/python -m venv --clear $(RAY_DEFAULT)
	packages=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		own=$$($(RAY_DEFAULT)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		echo "import site; site.addsitedir('$$packages')" > $$own/venv.pth
	$(RAY_DEFAULT)/bin/pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

# Debian's package, unpacked and not installed: no service starts, and the machine stays as it is.
DEBIAN := $(VENV)/debian
export PATH := $(CURDIR)/$(DEBIAN)/usr/bin:$(PATH)

prometheus: $(DEBIAN)/usr/bin/prometheus  ## fetch Debian's Prometheus, for the tests that use one

$(DEBIAN)/usr/bin/prometheus: $(INSTALLED)
	.ci/fetch_debian prometheus $(DEBIAN)
	touch $@

train: venv  ## train a small Xception on real multilabel images, asynchronously
	$(BIN)/asynception train recipes/quickstart.toml

PROCESSES ?= 2

TOGETHER = --numprocesses $(PROCESSES) --dist loadfile
UNIT = OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit tests/integration $(TOGETHER)
E2E = $(BIN)/python -m pytest tests/e2e

test: venv  ## the tests that CI runs, by PROCESSES=N
	$(UNIT) -m "not long"
	$(E2E) -m "not long and not alone" $(TOGETHER)
	$(E2E) -m "not long and alone"

test-long: venv $(RAY_DEFAULT)/.installed  ## all other tests: more seeds, more hosts, what docs show
	$(UNIT) -m long
	$(E2E) -m "long and not alone" $(TOGETHER)
	$(E2E) -m "long and alone"
	OMP_NUM_THREADS=1 $(RAY_DEFAULT)/bin/python -m pytest tests/e2e/test_prometheus.py \
		tests/e2e/test_cluster_demo.py

SEEDS ?= 1000

simtest: venv  ## thousands of simulated runs with faults; SEEDS=N
	$(BIN)/python -m asynception.simulate --seeds $(SEEDS)

RECIPE ?= recipes/pictograms.toml

cluster-demo: $(RAY_DEFAULT)/.installed  ## as root: a job over three hosts made of network namespaces, one of which dies; RECIPE=FILE
	$(RAY_DEFAULT)/bin/python -m asynception.hosts --recipe $(RECIPE)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/mypy

docs: venv  ## build the documentation into docs/_build; warnings are errors
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

proto: venv  ## generate the gRPC code anew
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. \
		protos/parameter_server.proto

bench: venv  ## time and memory of a pull, a push and an update
	$(BIN)/python benchmarks/pull_push_update.py

clean:  ## remove what the other targets made, but not runs/
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
