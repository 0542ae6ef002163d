# Two commands on a fresh machine: `make demo` runs a compression search, `make test` runs the tests.
# Another interpreter: `make demo PYTHON=python3.12`. Nothing is installed again until pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV := .venv
INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test install clean

demo: $(VENV)/.installed
	$(VENV)/bin/secateur search configs/searches/digits.yaml

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -m "not slow and not matrix and not data"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("secateur needs Python 3.11 or later, but $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing secateur and its dependencies into $(VENV); the first time this downloads several gigabytes ..."
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
