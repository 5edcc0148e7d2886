# Every target makes .venv if need be (Python 3.11 or newer; choose one with PYTHON=python3.12) and installs into it once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt
OLDEST := .venv-oldest
OLDEST_TESTS := tests/zoo/test_oldest.py tests/zoo/test_torchvision.py tests/zoo/test_open_clip.py \
  tests/model/test_tap.py tests/model/test_layout.py tests/model/test_registry.py tests/model/test_preprocess.py

.PHONY: demo picture test test-slow test-full test-oldest bench lint clean

demo: $(VENV)/.installed
	$(BIN)/vit-mechinterp demo --out out/demo

picture: demo
	cp out/demo/overview.png docs/demo.png

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not full"

test-slow: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

bench: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks --small

test-full: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m full --durations=0

# The lower ends of the supported ranges: what depends on the versions of the libraries that models come from.
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest -n 2 -p no:cacheprovider $(OLDEST_TESTS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(OLDEST) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.installed: $(BIN)/pip $(SOURCES)
	$(BIN)/pip install -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(BIN)/pip $(SOURCES)
	$(BIN)/pip install -c constraints.txt -e ".[test,lint]"
	touch $@ $(VENV)/.installed

# Without the bridged packages, which need newer versions; the test runner and open_clip are named here instead.
$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -c constraints-oldest.txt -e . hypothesis open_clip_torch pytest pytest-xdist scipy
	touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "vit_mechinterp needs Python 3.11 or newer, and '$(PYTHON)' is" \
	    "$$($(PYTHON) --version 2>&1 | head -n 1). Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "Could not make $(VENV); on Debian and Ubuntu the package python3-venv is needed." >&2; exit 1; }
