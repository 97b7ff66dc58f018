# make install | train | test | lint | bench | clean.   Pick an interpreter with PYTHON=python3.12, pass flags with ARGS="...".
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install train test lint bench clean

install: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "make install needs Python 3.10 or later: choose one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "make install needs Python's venv and ensurepip modules: on Debian or Ubuntu, apt install python3-venv" >&2; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# Two steps, because the operators are compiled against the installed torch: dependencies first, then the compiled build.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*) | $(BIN)/python
	@echo "installing dependencies into $(VENV) (torch and its CUDA libraries are several GB: some minutes the first time)"
	@$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e '.[test]'
	@echo "compiling the operators"
	@$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'import syncmask_fast.ops; from syncmask_fast import _native; print("operators:", _native.status())'
	@touch $(STAMP)

train: install
	$(BIN)/python -m syncmask_fast.train $(ARGS)

test: install lint
	$(BIN)/python -m pytest -q $(ARGS)

lint: install
	$(BIN)/python -m ruff check .

bench: install
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis syncmask_fast/_C.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
