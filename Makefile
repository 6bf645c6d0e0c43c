# Two commands do everything on a bare Debian 12 / Ubuntu 24.04 machine: make demo, make test.

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
PEER := build/slurm-plugin

.PHONY: demo test thorough lint types bench acceptance faults clean

demo: $(READY)
	@tools/demo "$(SPECTRA)" "$(DATABASE)" "$(CHUNKS)"

test: $(READY) lint types
	@tools/as-root $(PYTHON) -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not thorough"

thorough: $(READY)
	@tools/as-root $(PYTHON) -m pytest -m thorough

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(READY)
	$(VENV)/bin/mypy

bench: $(READY)
	@[ -x $(PEER)/bin/python ] || tools/setup-peer $(PEER) $(VENV) || echo "bench: no slurm plugin" >&2
	@tools/as-root $(PYTHON) -m bench $(PARTS)

$(READY): pyproject.toml tools/setup
	@tools/setup $(VENV)
	@touch $@

acceptance: $(READY)
	@tools/as-root --if-possible env TRACES="$(TRACES)" $(PYTHON) -m bench.acceptance

faults: $(READY)
	@tools/as-root $(PYTHON) -m bench.faults $(FAULT)

clean:
	rm -rf $(VENV) build dist
