# Everything here needs only make and a Python of at least 3.11; the first call sets up .venv by itself.
#   make demo    train the demonstration network
#   make test    every check: lint, format, types, unit tests, doctests
#   make slow    the tests marked slow
PYTHON ?= python3
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -n $(JOBS)

.PHONY: demo test lint types unit slow setup clean

demo: $(STAMP)
	$(BIN)/python -m dynarank train

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright

unit: $(STAMP)
	$(PYTEST)

# pytest exits with 5 when no test is marked slow, which is no failure.
slow: $(STAMP)
	$(PYTEST) -m slow --timeout=600 --durations=10 || test $$? -eq 5

setup: $(STAMP)

# torch goes first and alone, so that nothing else can choose its build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dynarank needs Python 3.11 or newer; pass PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(TORCH)
	$(PIP) install -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist
