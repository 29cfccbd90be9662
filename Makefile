# make setup   packages (apt, through sudo when not root) and a private virtual environment in .venv
# make demo    the main job, shown on a real qemu-storage-daemon; KEEP=1 leaves the agent running
# make test    everything that belongs to a change: lint, types, unit, contract and real-parts tests
# make test-full  the same, and what takes longer (the long kill matrix)
# make bench   figures, against named peers in the same run
# make lint    ruff and mypy alone

PYTHON := .venv/bin/python
STAMP := .venv/.ready

.PHONY: setup demo test test-full bench lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml tools/setup.sh
	@tools/setup.sh
	@touch $(STAMP)

demo: $(STAMP)
	@.venv/bin/hostagent demo $(if $(KEEP),--keep)

lint: $(STAMP)
	@.venv/bin/ruff check .
	@.venv/bin/mypy

test: lint
	@$(PYTHON) -m pytest -q -m "not slow"

test-full: lint
	@$(PYTHON) -m pytest -q

bench: $(STAMP)
	@$(PYTHON) -m tests.bench

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
