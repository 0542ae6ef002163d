# On a fresh machine: `make demo` runs a compression search, `make test` runs the tests, `make check` the linters and types.
# Another interpreter: `make demo PYTHON=python3.12`. Packages are installed again only when pyproject.toml or constraints.txt
# changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Test files are spread over the cores; four processes hold about as many gigabytes.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check wheel install clean

demo: $(VENV)/.installed
	$(BIN)/secateur search configs/searches/digits.yaml

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not faults and not matrix and not data and not packaging"

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m packaging

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("secateur needs Python 3.11 or later, but $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing secateur and its dependencies into $(VENV); the first time this downloads several gigabytes ..."
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) --editable ".[test,lint]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
