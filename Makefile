# Two commands do everything on a bare machine with Python 3.11: `make rlhf` and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
# accelerate launch takes one thread unless told; tests take one, since OpenMP on every core stalls a busy machine.
THREADS = $(or $(OMP_NUM_THREADS),$(shell getconf _NPROCESSORS_ONLN))

.PHONY: rlhf test lint clean

rlhf: $(VENV)/installed
	OMP_NUM_THREADS=$(THREADS) $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no recipes/rlhf.py $(ARGS)

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) outputs build dist *.egg-info
