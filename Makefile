# make install | train | test | test-all | soak | lint | bench | clean
# PYTHON=python3.12 picks the interpreter of .venv, ARGS="..." passes flags on.
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --no-compile --disable-pip-version-check
DEPENDENCIES := $(VENV)/.dependencies
STAMP := $(VENV)/.installed

.PHONY: install train test test-all soak lint bench clean

install: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "make install needs Python 3.10 or later: choose one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "make install needs Python's venv and ensurepip: on Debian, apt install python3-venv" >&2; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# Two steps, because the operators are compiled against the installed torch: dependencies first, then the build.
$(DEPENDENCIES): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing dependencies into $(VENV) (several GB with torch and CUDA: some minutes the first time)"
	@$(PIP) -c constraints.txt -e '.[test]'
	@touch $@

$(STAMP): $(DEPENDENCIES) setup.py $(wildcard csrc/*)
	@echo "compiling the operators"
	@$(PIP) --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'from syncmask_fast import ops, _native; print("operators:", _native.describe())'
	@touch $@

train: install
	$(BIN)/python -m syncmask_fast.train $(ARGS)

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses=8 --dist worksteal

# The fast tests; `make test-all` also runs those marked slow.
test: install lint
	$(PYTEST) -m "not slow" $(ARGS)

test-all: install lint
	$(PYTEST) $(ARGS)

# The long form of tests/faults: 50 kills, 1,000 mutants of each kind of input, a full disk (docs/reliability.md).
soak: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak $(ARGS)

lint: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check -q .
	$(BIN)/clang-format --dry-run -Werror csrc/*

bench: install
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis syncmask_fast/_C.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
