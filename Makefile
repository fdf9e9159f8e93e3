PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export TF_CPP_MIN_LOG_LEVEL ?= 2
export TRANSFORMERS_NO_ADVISORY_WARNINGS ?= 1

.PHONY: install peers demo channel codec benchmark quality test test-slow lint format clean

# Everything: the library, what tests and linting need, and the tools of the README.
install: .venv/test.stamp

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "megjax needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Set PYTHON=python3.11 or newer." >&2; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/run.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/test.stamp: .venv/run.stamp
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

# Other software that the benchmarks measure side by side, where it can be installed.
peers: .venv/peers.stamp

.venv/peers.stamp: .venv/run.stamp
	$(PIP) install --quiet --constraint constraints.txt --editable '.[peers]'
	@touch $@

# Prompts of your own: .venv/bin/python -m eval.generate "a red house under a night sky"
demo: .venv/run.stamp
	$(BIN)/python -m eval.generate

# Fading traces, and bit error rates of every modulation on their closed forms.
channel: .venv/run.stamp
	$(BIN)/python -m eval.rollouts

# The seed codec next to its rivals and its limit, and its tables in docs/; trains the learned receiver for the raw latent.
codec: .venv/run.stamp
	$(BIN)/python -m train.codec --variant denoiser --steps 5000
	$(BIN)/python -m eval.codec
	cp outputs/codec/docs_table.md docs/codec-results.md
	cp outputs/codec/psnr.png docs/codec-psnr.png
	cp outputs/codec/nmse.png docs/codec-nmse.png
	cp outputs/codec/additive.png docs/codec-additive.png

# Speed of the channel simulator on this machine; `make peers` first to see other software beside it.
benchmark: .venv/run.stamp
	$(BIN)/python -m eval.benchmark channel
	$(BIN)/python -m eval.benchmark tables

quality: .venv/run.stamp
	$(BIN)/python -m eval.quality

test: .venv/test.stamp
	$(BIN)/python -m pytest

test-slow: .venv/test.stamp
	$(BIN)/python -m pytest --runslow

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .pytest_cache .ruff_cache build *.egg-info
