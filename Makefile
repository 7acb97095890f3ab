# make demo       everything on a synthetic catalogue, from files to recommendations
# make test       all checks and all tests, as CI runs them
# make test-fast  tests without the slow ones
# make check      format, lint, types and import contracts
# make format     mend what a tool can mend

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --constraint constraints.txt
# Two processes of one thread each: more would share the same cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo test test-fast check format clean

demo: $(VENV)/.installed
	$(BIN)/dream-pyg demo

test: $(VENV)/.installed-dev $(VENV)/.installed-sampling check
	$(PYTEST)

test-fast: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow"

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info

# The stamps remember what is installed, so that a second call installs nothing.

$(VENV)/.installed: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable ".[dev,plots,tune]"
	touch $@

# Neither has a wheel: pip compiles them against the installed torch (about ten minutes) and keeps the result.
$(VENV)/.installed-sampling: $(VENV)/.installed
	$(PIP) setuptools wheel
	$(PIP) --no-build-isolation torch-scatter
	$(PIP) --no-build-isolation torch-sparse
	touch $@
