# demo: the main job on built-in real data · test · test-whole · test-slow · faults · mutants · lint · docs · clean. Each makes .venv where it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-whole test-slow faults mutants lint docs clean

demo: .venv/installed
	rm -rf runs/demo
	$(BIN)/python pretrain.py --config configs/demo.yaml
	$(BIN)/python evaluate.py runs/demo random pixels knn linear

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8

# whole commands from a shell, several processes, injected faults: CI runs it after `make test`
test-whole: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 -m 'whole and not slow and not gpu and not faults'

test-slow: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow

# every fault of docs/faults.md, and that page anew: 15 to 20 minutes on 2 cores
faults: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/report.py

# does the suite notice? wrong lines of the kind that costs a run in silence, each must be caught: some minutes
mutants: .venv/installed
	$(BIN)/python tests/mutants.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# the pages of docs/ as a site in docs/_build; a warning is an error
docs: .venv/installed
	$(BIN)/python -m sphinx -q -W --keep-going docs docs/_build

clean:
	rm -rf .venv docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
