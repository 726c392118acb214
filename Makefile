# Two commands do everything on a bare machine with Python 3.11 or newer: `make rlhf` and `make test`.
VENV ?= .venv
BIN = $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# The first of these that torch runs on and that can make an environment; PYTHON=... names another.
PYTHONS = python3 python3.13 python3.12 python3.11 python3.14 python
IS_SUITABLE = import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11) or sys.maxsize < 2**32)
PYTHON ?= $(shell for each in $(PYTHONS); do $$each -c "$(IS_SUITABLE)" 2>/dev/null && echo $$each && break; done)
# setuptools warns of what an editable installation is.
INSTALL = PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable

.PHONY: rlhf test lint clean

rlhf: $(VENV)/installed
	$(BIN)/hfllm rlhf $(ARGS)

# One thread: OpenMP on every core stalls a busy machine. What Python compiles is kept, whatever the environment says:
# the asserts of all tests take five seconds to rewrite, in each worker and each time.
test: $(VENV)/installed-dev
	env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: pyproject.toml setup.py | $(BIN)/python
	@echo "installing what the run needs into $(VENV), PyTorch first of all: some minutes the first time"
	@$(INSTALL) .
	@touch $@

$(VENV)/installed-dev: pyproject.toml setup.py | $(BIN)/python
	@echo "installing what the tests need into $(VENV): some minutes the first time"
	@$(INSTALL) '.[dev]'
	@touch $(VENV)/installed $@

$(BIN)/python:
	@$(or $(PYTHON),false) -c "$(IS_SUITABLE)" 2>/dev/null || { \
	  echo "error: $(if $(PYTHON),$(PYTHON) is not,none of $(PYTHONS) is) a 64-bit Python from 3.11 on with venv and pip (on Debian or" \
	  "Ubuntu: apt install python3-venv); PYTHON=/path/to/python names another" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) outputs build dist *.egg-info
