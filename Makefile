# make setup        packages (apt, through sudo when not root) and a private virtual environment in .venv
# make demo         the main job, shown on a real qemu-storage-daemon; KEEP=1 leaves the agent running
# make test         everything that belongs to a change: lint, types, unit, contract and real-parts tests
# make test-full    the same, and what takes longer (the long kill matrix, STORIES=600 seconds of generated stories,
#                   the package in a fresh Debian 12)
# make bench        figures, against named peers in the same run
# make bench-scale  the same at scale: 600 storage daemons, 100,000 finished jobs; minutes
# make lint         ruff and mypy alone
# make dist         an sdist and a wheel, in dist/, with the distribution's own tools
# make deb          a package for Debian 12, in dist/; DEB_VERSION=... where it is not the tree's
# make clean        without .venv and caches
#
# Each sets up what it needs by itself, once; again when pyproject.toml or tools/setup.sh change.

# Debian 12's Python 3.11.2 sometimes fails to parse for pytest (gh-106905): let it keep what it parsed once.
unexport PYTHONDONTWRITEBYTECODE

PYTHON := .venv/bin/python
STORIES ?= 600
# Tests wait more than they work: three at a time are right for two processors.
WORKERS ?= 3
PYTEST := $(PYTHON) -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
RUN := .venv/.run
DEVELOP := .venv/.develop

.PHONY: setup demo test test-full bench bench-scale lint dist deb clean

setup: $(DEVELOP)

$(RUN): pyproject.toml tools/setup.sh
	@tools/setup.sh run
	@touch $(RUN)

$(DEVELOP): pyproject.toml tools/setup.sh
	@tools/setup.sh develop
	@touch $(RUN) $(DEVELOP)

demo: $(RUN)
	@.venv/bin/hostagent demo $(if $(KEEP),--keep)

lint: $(DEVELOP)
	@.venv/bin/ruff check .
	@.venv/bin/mypy

test: lint
	@$(PYTEST) -m "not slow"

test-full: lint
	@STORIES=$(STORIES) GENERATED=100 $(PYTEST)

bench: $(DEVELOP)
	@$(PYTHON) -m tests.bench

bench-scale: $(DEVELOP)
	@$(PYTHON) -m tests.bench crowd history

dist: $(DEVELOP)
	@/usr/bin/python3 -m build --no-isolation --outdir dist

deb: $(DEVELOP)
	@tools/deb.sh $(DEB_VERSION)

clean:
	rm -rf build dist .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
