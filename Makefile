# Each command sets up what it needs: an environment, the dependencies, the compiled libraries. The second call is fast.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
UV := $(shell command -v uv 2>/dev/null)
READY := $(VENV)/built $(VENV)/installed
CSRC := $(shell find csrc -type f 2>/dev/null) setup.py

# One more than processors, as some tests wait for processes that they start.
WORKERS := $(shell expr $$(nproc 2>/dev/null || echo 2) + 1)

SHELL := bash
.SHELLFLAGS := -o pipefail -c

ifdef UV
NEW_VENV = uv venv --seed $(VENV)
INSTALL = uv pip install --python $(PY)
else
NEW_VENV = $(PYTHON) -m venv $(VENV)
INSTALL = $(PY) -m pip install --disable-pip-version-check
endif
# A line for each package that is fetched, so that nobody waits without a sign; none for those that are there.
TELL = | { grep --line-buffered -E "Collecting|Downloading|Building|Successfully|error|ERROR" || true; }

.PHONY: demo test test-matrix faults fuzz bench tables docs lint sanitize doctor build clean

demo: $(READY)  ## pretrains a small ViT on procedural images; report, pictures and checkpoint in runs/demo-*
	$(PY) train.py demo --output.folder runs/demo-$(shell date +%Y%m%d-%H%M%S)

test: $(READY)  ## every test that this machine can run
	$(PY) -m pytest -n $(WORKERS) --dist worksteal

test-matrix: $(READY)  ## the tests on other instruction sets, other versions of torch and other seeds; MATRIX="seeds avx2" picks
	$(PY) tests/matrix.py $(MATRIX)

faults: $(READY)  ## kills, damage, full disks and power cuts in real runs; fails if anything is lost; FAULTS="kills:50 damage" picks
	$(PY) tests/faults/run.py $(FAULTS)

fuzz: $(READY)  ## the fuzz tests for long, SECONDS=600 each
	PATCHLIGHT_FUZZ_SECONDS=$(or $(SECONDS),600) $(PY) -m pytest -n $(WORKERS) --dist worksteal --timeout 0 tests/fuzz

bench: $(READY)  ## every op at every size for this machine, tables and plots in bench/out
	$(PY) -m bench ops
	$(PY) -m bench report

tables: $(READY)  ## every row of the papers' tables with small drawn images, in build/tables; TABLES="SERE 5" picks, RESUME=--resume goes on
	$(PY) -m patchlight.command tables run $(TABLES) $(RESUME)

docs: $(READY)  ## the documentation as a site, in build/docs; every warning is an error
	$(PY) -m sphinx -q -W --keep-going -n -b html docs build/docs
	@echo "patchlight: open build/docs/index.html"

lint: $(READY)  ## style and types; .pre-commit-config.yaml runs the same tools
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

sanitize: $(READY)  ## the CUDA kernels on CPU threads under the thread and the address sanitizer
	$(PY) tests/ops/sanitize.py thread
	$(PY) tests/ops/sanitize.py address

doctor: $(READY)
	$(PY) -m patchlight_kernels doctor

build: $(READY)  ## again, as PATCHLIGHT_CUDA_ARCHS may ask for more than was built; what is there stays
	@$(PY) setup.py -q build_ext --inplace

# torch goes first: the libraries compile against the torch that is installed, and no second one is fetched for it.
$(VENV)/torch:
	@$(PYTHON) -c "import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); sys.exit(0 if ok else 'patchlight needs Python 3.11 to 3.13, found %d.%d; run make PYTHON=python3.12' % sys.version_info[:2])"
	@echo "patchlight: setting up $(VENV) (torch and its CUDA libraries are several gigabytes; this happens once)"
	@test -x $(PY) || $(NEW_VENV)
	@$(INSTALL) "setuptools>=77" "numpy>=1.26" "torch>=2.11" $(TELL)
	@touch $@

# Before the package is installed, as pip would hide how far the compiler is.
$(VENV)/built: $(VENV)/torch $(CSRC)
	@$(PY) setup.py -q build_ext --inplace
	@touch $@

$(VENV)/installed: pyproject.toml | $(VENV)/built
	@echo "patchlight: installing itself and the other packages"
	@$(INSTALL) --no-build-isolation -e ".[test,bench,tracking,export,docs]" $(TELL)
	@touch $@

clean:
	rm -rf build kernels/patchlight_kernels/lib/*.so
