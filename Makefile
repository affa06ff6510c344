# Every target sets up what it needs in .venv and may be run again at any time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
DEMO_ARGS ?=

.PHONY: demo test test-torch test-with packages-with torch-environment lint bench install

demo: install
	$(BIN)/python -m qlora_sft.demo --output $(RUN) $(DEMO_ARGS)

# Two processes with one thread each: the tests are many small things, and threads would get in each other's way.
# Optional: Go (apt install golang-go), whose text/template renders the Ollama templates, and npm, which fetches the
# tokenizers of other families; without them those tests are skipped and say so.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The tests of what depends on torch's version, with another torch in a virtual environment of its own:
#   make test-torch TORCH=2.11.0
# Older CPU builds are not on PyPI, so this fetches CUDA's libraries as well, some 4 GB, and uses none of them.
TORCH ?= 2.10.0
OTHER := .venv-torch-$(TORCH)
torch-environment: $(OTHER)/installed

test-torch: $(OTHER)/installed
	OMP_NUM_THREADS=1 $(OTHER)/bin/python -m pytest -q -n 2 --dist loadfile tests/kernels tests/plan/test_weights.py \
	  tests/plan/test_random_model.py tests/model/test_attention.py tests/model/test_attention_families.py \
	  tests/model/test_flex_trace.py tests/model/test_attention_tree.py tests/model/test_qkv.py tests/model/test_memory.py \
	  tests/training/test_equality.py tests/training/test_masters.py

# Triton comes with torch; everything else is that of the lock.
$(OTHER)/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/pip install --quiet --disable-pip-version-check torch==$(TORCH)
	grep -vE '^(torch|triton)==' requirements.lock > $(OTHER)/requirements.txt
	$(OTHER)/bin/pip install --quiet --disable-pip-version-check --no-deps -r $(OTHER)/requirements.txt
	$(OTHER)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# The same for the packages above torch: other versions of some of them are laid over .venv, by default the newest that
# pyproject.toml allows.
#   make test-with PACKAGES="transformers==5.24.0"
PACKAGES ?= transformers==5.24.0 trl==1.16.0 datasets==5.2.0
TESTS ?= tests/data/test_families.py tests/data/test_render.py tests/data/test_sources.py tests/model/test_every_family.py \
  tests/model/test_experts.py tests/model/test_qkv.py tests/model/test_attention_families.py tests/model/test_load.py \
  tests/training/test_equality.py tests/training/test_masters.py tests/training/test_resume.py tests/plan/test_weights.py \
  tests/export/test_merge.py tests/evaluation/test_generate.py
OVER := .venv-with
test-with: packages-with
	PYTHONPATH=$(CURDIR)/$(OVER) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile $(TESTS)

packages-with: install
	rm -rf $(OVER)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(OVER) $(PACKAGES)

# Benchmarks run rarely, so that a name or an argument that is no more would be found late. Rows are looser than types.
LOOSELY := $(addprefix --disable-error-code=, arg-type assignment call-overload import-untyped literal-required misc \
  no-any-return operator return-value type-var typeddict-item typeddict-unknown-key valid-type var-annotated)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=kernels:benchmarks:benchmarks/kernels:tests $(BIN)/mypy $(LOOSELY) benchmarks/*.py benchmarks/kernels/*.py

bench: install
	$(BIN)/python benchmarks/kernels/packed_ce.py

# Finds an NVIDIA driver and takes the build of torch that it runs; .venv/bin/python -m qlora_sft.install --dry-run says which.
install: $(VENV)/installed

# The stamp is written last, so an installation that was cut short is done again.
$(VENV)/installed: requirements.lock pyproject.toml qlora_sft/install.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m qlora_sft.install
	touch $@
