# Two commands do everything on a bare Debian 12 / Ubuntu 24.04 machine: make demo, make test.

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test lint types bench acceptance clean

demo: $(READY)
	@tools/demo "$(SPECTRA)" "$(DATABASE)" "$(CHUNKS)"

test: $(READY) lint types
	@tools/as-root $(PYTHON) -m pytest

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(READY)
	$(VENV)/bin/mypy

bench: $(READY)
	@tools/as-root $(PYTHON) -m bench

$(READY): pyproject.toml tools/setup
	@tools/setup $(VENV)
	@touch $@

acceptance: $(READY)
	@tools/as-root --if-possible env TRACES="$(TRACES)" $(PYTHON) -m bench.acceptance

clean:
	rm -rf $(VENV) build dist
