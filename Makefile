# Everything sets itself up: `make demo`, `make demo-iwae` and `make test` need Python 3.10 or newer, and nothing else.
#
# They install into VENV, with the torch that TORCH pins: `make demo TORCH=torch==2.12.0` takes another. To use an environment
# that has torch and triton already, leave it empty: `make demo TORCH= PYTHON=path/to/python` installs the rest into that one.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# A torch that is built for CUDA brings the triton that it needs; this one, or the last that Python 3.10 has, goes with a torch that
# brings none.
TRITON ?= $(if $(filter Linux,$(shell uname)),triton<=3.9.0)

RELEASE := .venv-release

# $(call install,PYTHON): what TORCH and TRITON say.
define install
$(1) -m pip install $(TORCH)
$(if $(TRITON),$(1) -m pip show --quiet triton || $(1) -m pip install "$(TRITON)")
endef

OUTSIDE := cd $(RELEASE) && PYTHONPATH=

ifneq ($(TORCH),)
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready-$(subst =,-,$(TORCH))
DOCS_READY := $(VENV)/.docs-ready
else
RUN := $(PYTHON)
READY := own
DOCS_READY := own-docs
endif

.PHONY: demo demo-iwae test test-torch test-torch-a-c test-torch-d-z test-triton test-triton-a-l test-triton-m-z lint test-integrations
.PHONY: bench budget docs release-check own clean
.PHONY: own-docs gpu gpu-first gpu-tests gpu-bench gpu-samples

demo: $(READY)
	$(RUN) examples/train_digits.py

demo-iwae: $(READY)
	$(RUN) examples/train_iwae.py

# Both backends pass the same tests, side by side: Torch, and Triton through its interpreter, which a process chooses before it
# imports triton.
test: $(READY)
	$(MAKE) -j2 $(if $(filter output-sync,$(.FEATURES)),--output-sync) test-torch test-triton lint

# In two parts each, so that both processors are busy to the end.
test-torch: test-torch-a-c test-torch-d-z
test-triton: test-triton-a-l test-triton-m-z

test-torch-a-c test-torch-d-z: test-torch-%: $(READY)
	$(RUN) -m pytest tests/test_[$*]*.py

test-triton-a-l test-triton-m-z: test-triton-%: $(READY)
	TRITON_INTERPRET=1 FASTELBO_BACKEND=triton $(RUN) -m pytest tests/test_[$*]*.py

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Lightning and Accelerate, and pythae, scvi-tools and diffusers to compare losses with. They bring much with them, so have an
# environment of their own, and need Python 3.11.
test-integrations: .venv-integrations/.ready
	.venv-integrations/bin/python -m pytest tests/integrations

# The documentation, into docs/_build. It draws its plots from what the code of its pages computes. A warning is an error; links to
# other projects need a network, and are left out without one.
docs: $(DOCS_READY)
	$(RUN) docs/figures
	$(RUN) -m sphinx --fail-on-warning --keep-going --fresh-env --quiet docs docs/_build
	@echo "built docs/_build/index.html"

# What a release is: both packages into dist, checked; the wheel, in a new environment and another folder, passes its self-test and a
# smoke test, with Triton, by Triton's interpreter, and without Triton. TAG=v1.2.3 must be the version's, where it is given.
release-check:
	rm -rf build dist $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)
	$(call install,$(RELEASE)/bin/python)
	$(RELEASE)/bin/python -m pip install build twine numpy
	$(RELEASE)/bin/python -m build --outdir dist
	$(RELEASE)/bin/python -m twine check --strict dist/*
	$(RELEASE)/bin/python -m pip install dist/*.whl
	cp tests/smoke.py $(RELEASE)/smoke.py
	$(OUTSIDE) bin/python -c "import fastelbo, sys; sys.exit('$(TAG)' not in ('', 'v' + fastelbo.__version__))"
	$(OUTSIDE) bin/python -m fastelbo
	$(OUTSIDE) bin/python smoke.py
	$(OUTSIDE) TRITON_INTERPRET=1 FASTELBO_BACKEND=triton bin/python smoke.py
	$(RELEASE)/bin/python -m pip uninstall --yes triton
	$(OUTSIDE) bin/python -m fastelbo
	$(OUTSIDE) bin/python smoke.py

# In turns with the naive code, on a CUDA GPU if there is one: `python -m bench --help` has the options, and
# `python -m bench.report --write bench/results/*.json` brings tables and plots up to date. What many samples
# cost is measured by `python -m bench.samples --write`; what calls cost on the host is counted by `python -m bench.host`.
bench: $(READY)
	$(RUN) -m bench
	$(RUN) -m bench.likelihoods --seconds 0.3 --write
	$(RUN) -m bench.sparse --seconds 0.3 --write

# What the compiled kernels cost, and that each of them keeps the budget; to be run whenever they change.
budget: $(READY)
	$(RUN) -m bench.budget --write
	EVERY_KERNEL=1 $(RUN) -m pytest tests/test_budget.py tests/test_divergence.py::test_kernels_compile_without_spills

# The tests and benchmarks on a CUDA GPU, with the torch and triton that PYTHON has, and no network. Each of the four takes less
# than ten minutes, the most telling one first; bench/gpu.py says what is in them. Logs and results go to the folder OUT, if that
# is set: `make gpu-first OUT=/some/folder`. Where there is no git, COMMIT says what the results are of.
gpu:
	$(PYTHON) -m bench.gpu first tests bench samples

gpu-first gpu-tests gpu-bench gpu-samples: gpu-%:
	$(PYTHON) -m bench.gpu $*

# Made anew when the requirements change.
$(VENV)/.ready-%: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(call install,$(RUN))
	$(RUN) -m pip install -e ".[test,bench,examples]"
	touch $@

$(VENV)/.docs-ready: $(READY)
	$(RUN) -m pip install -e ".[docs]"
	touch $@

.venv-integrations/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-integrations
	$(call install,.venv-integrations/bin/python)
	.venv-integrations/bin/python -m pip install -e ".[test,examples,integrations]"
	touch $@

own:
	$(PYTHON) -m pip install -e ".[test,bench,examples]"

own-docs: own
	$(PYTHON) -m pip install -e ".[docs]"

clean:
	rm -rf $(VENV) .venv-integrations $(RELEASE) build dist *.egg-info out docs/_build docs/figures/out
