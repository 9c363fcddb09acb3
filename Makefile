# Two commands are all the set-up there is:  make demo   and   make test
# Other targets: bench gpu compat docs lint clean (see README.md).

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
COMPAT := .compat

# The first Python >= 3.11 among the usual names; `make PYTHON=/path/to/python3.12 test` overrides.
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
endif
CXX_FOUND := $(shell for c in "$(CXX)" c++ g++ clang++; do \
    [ -n "$$c" ] && $$c --version >/dev/null 2>&1 && { echo "$$c"; break; }; done)

# What an installation is made of: a change in any of these installs (and builds the native engine) anew.
INGREDIENTS := pyproject.toml constraints.txt $(wildcard setup.py) \
    $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' \) 2>/dev/null)
INTERPRETER_TESTS = $(wildcard tests/test_*interpreter*.py)
DEMO = fit --compare --size 144 --steps 120 --lr 2e-4 --out demo

.PHONY: demo test bench gpu compat compat-torch docs lint clean check-tools

demo: $(STAMP)
	@$(BIN)/fused-inr $(DEMO)

# WORKERS tests at a time, each with one thread: a file of tests stays in one worker. Executed kernels (tests/ptx) share
# nothing, and each takes as long as its compilation: they go to whoever is free.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
PYTEST_PTX := $(subst loadfile,worksteal,$(PYTEST))

# Three processes: under TRITON_INTERPRET=1 Triton cannot compile, and without it nothing interprets; executed kernels put
# a driver of their own in the place of Triton's. All run whatever the others say; the exit status is 0 only if all passed.
test: $(STAMP)
	@status=0; \
	if [ -n "$(INTERPRETER_TESTS)" ]; then \
	    echo "== kernels in Triton's interpreter"; \
	    TRITON_INTERPRET=1 $(PYTEST) -q $(INTERPRETER_TESTS) || status=1; \
	fi; \
	echo "== compiled kernels, executed"; \
	$(PYTEST_PTX) -q tests/ptx || status=1; \
	echo "== everything else"; \
	$(PYTEST) tests --ignore-glob='*interpreter*' --ignore=tests/ptx || status=1; \
	[ $$status -eq 0 ] || echo "make test: at least one of the runs above failed" >&2; \
	exit $$status

bench: $(STAMP)
	@$(BIN)/fused-inr bench table

# The API reference, from the docstrings: the modules that fused_inr names. The files of activations, fusion and init say nothing
# that those modules do not say (tests/test_docs.py makes the same pages).
DOCUMENTED := fused_inr '!fused_inr.activations.' '!fused_inr.init.' '!fused_inr.fusion.'
docs: $(STAMP)
	$(BIN)/python -m pdoc --docformat google --template-directory docs/reference -o build/docs $(DOCUMENTED)
	@echo "build/docs/index.html"

lint: $(STAMP)
	@$(BIN)/python -m pip install -q -c constraints.txt ruff mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

# The interpreter's tests, some executed kernels and the static report under the oldest Triton served and a newer one than
# torch's own. Only Triton differs: it lies in a folder of its own, ahead of the environment's. (3.6.0's interpreter needs numpy < 2.4, which
# constraints.txt grants.) The report compiles every kernel, kind of product and type once an architecture; all of it, an
# hour for each version on two cores, with `make compat STATIC=`. Then the CPU's tests under torch 2.11, which many GPU
# machines have, in an environment of its own: the registry's build of it brings CUDA, 3 GB to download and 6 GB of disk.
# Where disk or network forbid that, a line says so, and the rest counts.
STATIC ?= --sample
COMPAT_TORCH := 2.11.0
COMPAT_TORCH_KIB := 12000000
COMPAT_PTX = tests/ptx -k 'test_binders or (test_layers and sine) or (test_networks and test_sine and 64)'
compat: $(COMPAT)/triton-3.6.0/.installed $(COMPAT)/triton-3.9.0/.installed
	@status=0; \
	for version in 3.6.0 3.9.0; do \
	    echo "== Triton $$version"; \
	    export PYTHONPATH="$(CURDIR)/$(COMPAT)/triton-$$version"; \
	    $(BIN)/python -c "import sys, triton; sys.exit(triton.__version__ != '$$version')" || \
	        { echo "make compat: Triton $$version is not the one that is imported" >&2; exit 1; }; \
	    TRITON_INTERPRET=1 $(PYTEST) -q $(INTERPRETER_TESTS) || status=1; \
	    $(PYTEST_PTX) -q $(COMPAT_PTX) || status=1; \
	    $(BIN)/fused-inr bench static $(STATIC) || status=1; \
	done; \
	$(MAKE) --no-print-directory compat-torch || status=1; \
	exit $$status

# Tests that need neither Triton's compiler nor an installation, from the checkout; the native engine is compiled anew.
COMPAT_PYTHON = $(COMPAT)/torch-$(COMPAT_TORCH)/bin/python
COMPAT_TESTS = $(addprefix tests/test_, activations.py backends.py float32_products.py init.py init_network.py layers.py \
    linear_act.py mlp.py models.py moments.py special_values.py torch_integration.py user_formula.py)
compat-torch:
	@echo "== torch $(COMPAT_TORCH)"; \
	if $(MAKE) --no-print-directory $(COMPAT)/torch-$(COMPAT_TORCH)/.installed; then \
	    PYTHONPATH="$(CURDIR)" OMP_NUM_THREADS=1 $(COMPAT_PYTHON) -m pytest -n $(WORKERS) --dist loadfile -q $(COMPAT_TESTS); \
	else \
	    echo "make compat: torch $(COMPAT_TORCH) cannot be installed here (see above), and is left out"; \
	fi

$(COMPAT)/triton-%/.installed: $(STAMP)
	rm -rf $(@D)
	$(BIN)/python -m pip install -q --no-deps --target $(@D) 'triton==$*'
	@touch $@

$(COMPAT)/torch-%/.installed:
	@mkdir -p $(COMPAT); free=`df -Pk $(COMPAT) | awk 'END { print $$4 }'`; \
	    [ $$free -ge $(COMPAT_TORCH_KIB) ] || { echo "$$free KiB free, torch $* takes $(COMPAT_TORCH_KIB)" >&2; exit 1; }
	rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	grep -v -e '^torch==' -e '^triton==' -e '^setuptools==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install -q -c $(@D)/constraints.txt 'setuptools>=77' 'torch==$*' numpy matplotlib pillow \
	    safetensors tqdm sympy pytest pytest-xdist pytest-benchmark hypothesis scipy
	@touch $@

# A CUDA machine, network or not: from this checkout, with the Python that has torch (GPU_PYTHON). Nothing is installed or
# downloaded; what has to be built is built while other things are measured. `make gpu GPU_ARGS="--budget 200 --out DIR"`
GPU_PYTHON ?= $(or $(PYTHON),python3)
gpu:
	@$(GPU_PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || \
	    { echo "make gpu: $(GPU_PYTHON) has no torch that sees a CUDA device (GPU_PYTHON=... names another)" >&2; exit 1; }
	$(GPU_PYTHON) -m fused_inr.cli bench gpu $(GPU_ARGS)

clean:
	rm -rf $(VENV) $(COMPAT) build dist demo *.egg-info fused_inr/*.so
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

check-tools:
	@[ -n "$(PYTHON)" ] || { \
	    echo "fused_inr needs Python 3.11 or newer, and none of python3, python3.11 .. python3.14 is." >&2; \
	    echo "Install one, or name it: make PYTHON=/path/to/python3.12 test" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "fused_inr needs Python 3.11 or newer; $(PYTHON) is `$(PYTHON) --version 2>&1`." >&2; exit 1; }
	@[ -n "$(CXX_FOUND)" ] || { \
	    echo "No C++ compiler found (looked for \$$CXX, c++, g++, clang++), and the native CPU engine needs one." >&2; \
	    echo "Install g++ or clang++, or name it: make CXX=/path/to/g++ test" >&2; \
	    echo "Without a compiler 'pip install .' works too: layers then run on plain PyTorch." >&2; exit 1; }

# setuptools first: torch's and our own build need >= 77, older environments come with less, and without build isolation
# nothing else would fetch it.
$(STAMP): $(INGREDIENTS) | check-tools
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt 'setuptools>=77' numpy torch
	FUSED_INR_REQUIRE_NATIVE=1 $(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e '.[fit,test]'
	@# packages whose networks tests fuse, without what they need beside them
	@for package in deepxde INR-collection msa-inr neuraloperator pinnrl; do \
	    $(BIN)/python -m pip install -q --no-deps --no-build-isolation -c constraints.txt $$package || \
	        echo "$$package could not be installed: its tests will be skipped" >&2; \
	done
	@touch $@
