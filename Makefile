# Each command sets up what it needs: an environment, the dependencies, the compiled libraries. The second call is fast.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
UV := $(shell command -v uv 2>/dev/null)
CSRC := $(shell find csrc -type f 2>/dev/null) setup.py

ifdef UV
NEW_VENV = uv venv --seed $(VENV)
INSTALL = uv pip install --python $(PY)
else
NEW_VENV = $(PYTHON) -m venv $(VENV)
INSTALL = $(PY) -m pip install --disable-pip-version-check --quiet
endif

.PHONY: demo test bench lint sanitize doctor build clean

demo: $(VENV)/built  ## pretrains a small ViT on procedural images; report, pictures and checkpoint in runs/demo-*
	$(PY) train.py demo --output.folder runs/demo-$(shell date +%Y%m%d-%H%M%S)

test: $(VENV)/built  ## every test that this machine can run
	$(PY) -m pytest -n $(shell nproc 2>/dev/null || echo 2) --dist worksteal

bench: $(VENV)/built  ## every op at every size for this machine, tables and plots in bench/out
	$(PY) -m bench ops
	$(PY) -m bench report

lint: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

sanitize: $(VENV)/built  ## the CUDA kernels on CPU threads under the thread and the address sanitizer
	$(PY) tests/ops/sanitize.py thread
	$(PY) tests/ops/sanitize.py address

doctor: $(VENV)/built
	$(PY) -m patchlight_kernels doctor

build: $(VENV)/built

# torch goes first: the libraries compile against the torch that is installed, and no second one is fetched for it.
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c "import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); sys.exit(0 if ok else 'patchlight needs Python 3.11 to 3.13, found %d.%d; run make PYTHON=python3.12' % sys.version_info[:2])"
	@echo "patchlight: setting up $(VENV) (torch and its CUDA libraries are several gigabytes; this happens once)"
	test -x $(PY) || $(NEW_VENV)
	$(INSTALL) "setuptools>=77" "torch>=2.11"
	$(INSTALL) --no-build-isolation -e ".[test,bench,tracking]"
	@touch $@

$(VENV)/built: $(VENV)/installed $(CSRC)
	@$(PY) setup.py -q build_ext --inplace
	@touch $@

clean:
	rm -rf build kernels/patchlight_kernels/lib/*.so
