VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
OLDEST_VENV ?= .venv-oldest
OLDEST_PYTHON ?= python3.10

.PHONY: setup demo test test-all test-oldest check bench accept coverage coverage-columns docs

setup: $(STAMP)

# Where nothing is written, each of the suite's many processes would compile what it imports again.
unexport PYTHONDONTWRITEBYTECODE

# A new pip needs half the time of the one that Python brings. Then torch, by its exact version: pip takes the build that the
# file of constraints names and nothing newer.
define install
$(1) -m venv $(@D)
$(@D)/bin/python -m pip install --quiet --disable-pip-version-check 'pip>=26'
$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $$(grep -E '^(torch|torchvision)==' $(2))
$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2) -e '.[dev]' 'setuptools>=77'
touch $@
endef

$(STAMP): pyproject.toml constraints.txt
	$(call install,python3,constraints.txt)

$(OLDEST_VENV)/.installed: pyproject.toml constraints-oldest.txt
	$(call install,$(OLDEST_PYTHON),constraints-oldest.txt)

demo: setup
	$(PYTHON) -m papr_fx demo

test: setup check
	$(PYTHON) -m pytest -n 2

test-all: setup check
	.ci/packages chromium  # opens the site of the documentation
	$(PYTHON) -m pytest -n 2 --all

# The suite on the oldest versions. Their wheels of torch bring the CUDA libraries, 5 GB: OLDEST_VENV says where to.
test-oldest: $(OLDEST_VENV)/.installed
	$(OLDEST_VENV)/bin/python -m pytest -n 2

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --threads 2

bench: setup
	$(PYTHON) -m benchmarks.tokens
	$(PYTHON) -m benchmarks.pixels

accept: setup
	$(PYTHON) -m pytest -n 2 --accept tests/review/test_golden.py

# Two to three hours on two cores.
coverage: setup
	$(PYTHON) -m papr_fx models --library timm torchvision transformers --workers 2 --table docs/coverage.md

# Some twenty minutes on two idle cores: what the page says besides the proofs, where it says nothing yet.
coverage-columns: setup
	$(PYTHON) -m papr_fx models --workers 2 --table docs/coverage.md --columns

# Into out/site: open out/site/index.html. Nothing of it is read from the network.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --quiet
