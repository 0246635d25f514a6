# Everything sets itself up: `make demo` and `make test` need Python 3.10 or newer, and nothing else.
#
# TORCH pins what is installed. A GPU owner may name another (`make demo TORCH=torch==2.12.0`), or leave it empty
# (`make demo TORCH=`) to use the torch and triton that the Python in PYTHON has already.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0

BIN := $(VENV)/bin
# Made anew when the project's requirements or the pin change.
READY := $(VENV)/.ready-$(subst =,-,$(or $(TORCH),own))

.PHONY: demo test lint gpu clean

demo: $(READY)
	$(BIN)/python examples/train_digits.py

# Both backends pass the same tests: Torch, then Triton through its interpreter, which a process chooses before it imports triton.
test: lint
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 FASTELBO_BACKEND=triton $(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The tests on the real kernels, with the torch and triton that PYTHON has. No network, no virtual environment.
gpu:
	@if ! $(PYTHON) -c "import importlib.util as i, sys; sys.exit(not (i.find_spec('torch') and __import__('torch').cuda.is_available()))"; then \
		echo "make gpu: no CUDA GPU here, so nothing was run"; \
	else \
		set -ex; \
		$(PYTHON) -m pip install --no-deps --no-build-isolation -e .; \
		FASTELBO_BACKEND=triton $(PYTHON) -m pytest; \
		FASTELBO_BACKEND=torch $(PYTHON) -m pytest; \
	fi

$(READY): pyproject.toml
	$(PYTHON) -m venv $(if $(TORCH),,--system-site-packages) $(VENV)
	$(if $(TORCH),$(BIN)/pip install $(TORCH) $(TRITON))
	$(BIN)/pip install -e ".[test,bench,examples]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
