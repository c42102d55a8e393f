# On a machine with Python 3.10 or newer, make and git:
#   make demo    install what is needed into .venv and paint a picture
#   make test    the tests
#   make check   format, lint, types, floors, tests: what a change must pass
#   make bench   the benchmark tables, side by side with the peer
#   make fuzz    the readers of files against mutated ones, SECONDS for each
PYTHON ?= python3
VENV ?= .venv
# One known torch, so that nobody downloads a newer one by accident. Any other >= 2.9 works: `make TORCH=torch==2.9.1`;
# without an NVIDIA GPU, `make TORCH_FLAGS='--index-url https://download.pytorch.org/whl/cpu'` is a smaller download.
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=
PROMPT ?= a small red circle above a large blue square on a white background
PYTEST_FLAGS ?=
SECONDS ?= 60

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n logical --maxprocesses 8 $(PYTEST_FLAGS)

.PHONY: demo test check format lint types bench fuzz clean

demo: $(VENV)/.installed
	@mkdir -p out
	$(VENV)/bin/effusion generate "$(PROMPT)" --model demo --seed 7 --out out/demo.png

test: $(VENV)/.installed-dev
	$(PYTEST)

check: format lint types
	$(RUN) -m pytest -q tests/project/test_floors.py
	$(PYTEST)

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check .

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .

types: $(VENV)/.installed-dev
	$(VENV)/bin/mypy

bench: $(VENV)/.installed-dev
	$(RUN) -m benchmarks

fuzz: $(VENV)/.installed-dev
	$(PIP) install -q -e '.[fuzz]'
	$(RUN) -m tests.fuzz --seconds $(SECONDS)

clean:
	rm -rf $(VENV) out build .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch first and by itself: whatever asks for it later finds it there
$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Effusion needs Python 3.10 or newer; see PYTHON=")'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(RUN) -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)' 2>/dev/null \
		|| $(PIP) install -q $(TORCH_FLAGS) $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) install -q -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(PIP) install -q -e '.[dev]'
	@touch $@ $(VENV)/.installed
