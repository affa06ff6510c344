# Every target sets up what it needs in .venv and may be run again at any time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
DEMO_ARGS ?=

.PHONY: demo test lint bench install

demo: install
	$(BIN)/python -m qlora_sft.demo --output $(RUN) $(DEMO_ARGS)

# Two processes with one thread each: the tests are many small things, and threads would get in each other's way.
# Optional: Go (apt install golang-go), whose text/template renders the Ollama templates, and npm, which fetches the
# tokenizers of other families; without them those tests are skipped and say so.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python benchmarks/kernels/packed_ce.py

install: $(VENV)/installed

# The stamp is written last, so an installation that was cut short is done again.
$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@
