# Two commands from a fresh clone: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
export JAX_PLATFORMS ?= cpu

.PHONY: quickstart demo smoke test test-slow test-beam lint clean distclean help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "tmljax needs Python 3.11 or newer, found " + sys.version.split()[0] + "; set PYTHON=/path/to/a/newer/python")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on --constraint constraints.txt --editable '.[test]'
	@touch $@

quickstart: $(BIN)/.installed  ## data, training, evaluation, a streamed conversation, an export; names the report
	PYTHON=$(BIN)/python launch/quickstart.sh quickstart $(RUN)

demo: $(BIN)/.installed  ## the same with the demo model: some 45 minutes of training on two cores
	PYTHON=$(BIN)/python launch/quickstart.sh demo runs/demo

smoke: $(BIN)/.installed  ## the same in miniature, to see that every part works: two minutes
	PYTHON=$(BIN)/python launch/quickstart.sh smoke runs/smoke

test: $(BIN)/.installed  ## lint, then the whole test suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(BIN)/.installed  ## tests that take minutes
	$(BIN)/python -m pytest -m slow

# Apache Beam wants older versions of these than training is tested with.
test-beam:  ## the dataset builder on Apache Beam's local runner, in an environment of its own
	$(PYTHON) -m venv $(VENV)-beam
	grep -vE '^(protobuf|pyarrow|python-dateutil|numpy)==' constraints.txt > $(VENV)-beam/constraints.txt
	$(VENV)-beam/bin/python -m pip install --constraint $(VENV)-beam/constraints.txt --editable '.[beam,test]'
	$(VENV)-beam/bin/python -m pytest -m '' tests/data_pipelines/test_beam.py

lint: $(BIN)/.installed  ## format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and caches; datasets and runs stay
	rm -rf $(VENV) $(VENV)-beam build *.egg-info .pytest_cache .ruff_cache

distclean: clean  ## remove datasets and trained models too
	rm -rf runs data
