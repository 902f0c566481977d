VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-all check bench accept coverage

setup: $(STAMP)

# torch first, by its exact version: pip then takes the build that constraints.txt names and nothing newer.
$(STAMP): pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check $$(grep -E '^(torch|torchvision)==' constraints.txt)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' 'setuptools>=77'
	touch $(STAMP)

demo: setup
	$(PYTHON) -m papr_fx demo

test: setup check
	$(PYTHON) -m pytest -n 2

test-all: setup check
	$(PYTHON) -m pytest -n 2 --all

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

bench: setup
	$(PYTHON) -m benchmarks.tokens
	$(PYTHON) -m benchmarks.pixels

accept: setup
	$(PYTHON) -m pytest -n 2 --accept tests/review/test_golden.py

# Two to three hours on two cores.
coverage: setup
	$(PYTHON) -m papr_fx models --library timm torchvision transformers --workers 2 --table docs/coverage.md
