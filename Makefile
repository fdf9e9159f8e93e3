PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# By a path: otherwise Python started in the folder above takes this folder, of the same name, for the package.
EDITABLE := --config-settings editable_mode=compat --editable
export TF_CPP_MIN_LOG_LEVEL ?= 2
export TRANSFORMERS_NO_ADVISORY_WARNINGS ?= 1

.PHONY: install peers peer-flax tpu demo channel codec power figures benchmark gpu wheels aot aot-gpu quality test test-all coverage lint format clean

# Everything: the library, what tests and linting need, and the tools of the README.
install: .venv/test.stamp

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "megjax needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Set PYTHON=python3.11 or newer." >&2; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/run.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) install --quiet --constraint constraints.txt $(EDITABLE) .
	@touch $@

.venv/test.stamp: .venv/run.stamp
	$(PIP) install --quiet --constraint constraints.txt $(EDITABLE) '.[test]'
	@touch $@

# Other software that the benchmarks measure side by side, where it can be installed.
peers: .venv/peers.stamp

.venv/peers.stamp: .venv/run.stamp
	$(PIP) install --quiet --constraint constraints.txt $(EDITABLE) '.[peers]'
	@touch $@

# The last diffusers with Flax models, for `eval.benchmark diffusion`; it needs older packages, so an environment of its own.
peer-flax: .venv/flax-peer.stamp

.venv/flax-peer.stamp: | .venv/run.stamp
	$(PYTHON) -m venv .venv/flax-peer
	.venv/flax-peer/bin/python -m pip --disable-pip-version-check install --quiet \
	  diffusers==0.39.0 transformers==4.57.6 jax==0.10.2 flax==0.12.8 numpy==2.4.6
	@touch $@

# libtpu, which compiles for TPUs on any Linux machine; kept apart, as JAX looks for a TPU wherever it finds it.
tpu: .venv/tpu.stamp

.venv/tpu.stamp: .venv/run.stamp
	$(PIP) install --quiet --constraint constraints.txt --no-deps --upgrade --target .venv/libtpu libtpu
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
	$(BIN)/python -m eval.sweep --preset codec --training runs/codec-scenes/generated --output outputs/codec
	$(BIN)/python -m eval.codec_report
	cp outputs/codec/docs_table.md docs/codec-results.md
	cp outputs/codec/psnr.png docs/codec-psnr.png
	cp outputs/codec/nmse.png docs/codec-nmse.png
	cp outputs/codec/additive.png docs/codec-additive.png

# Power policies: five seeds of PPO and correlated fading next to the causal optimum; image rewards need the caches of `make codec`.
power: .venv/run.stamp
	for seed in 0 1 2 3 4; do $(BIN)/python -m train.power --weights equal --seed $$seed || exit 1; done
	$(BIN)/python -m train.power --updates 300
	$(BIN)/python -m train.power --weights equal --fading gauss-markov
	$(BIN)/python -m train.power --weights equal --fading jakes
	$(BIN)/python -m train.power --weights equal --fading jakes --history 4
	$(BIN)/python -m train.power --reward image --start scenes --envs 128 --updates 60 --learning-rate 1e-3
	$(BIN)/python -m eval.power
	$(BIN)/python -m eval.sweep --preset power --output outputs/power
	$(BIN)/python -m eval.power_images
	cat outputs/power/tables.md outputs/power/images.md > docs/power-results.md
	cp outputs/power/policies.png docs/power-policies.png
	cp outputs/power/map.png docs/power-map.png
	cp outputs/power/learning.png docs/power-learning.png

# Every figure and table of docs/results.md: sweeps that resume, costs, a PPO run. QUICK=1 is a small version, in
# outputs/quick.
FIGURES := $(if $(QUICK),outputs/quick,outputs/sweeps)
figures: export OPENBLAS_NUM_THREADS ?= 1
figures: .venv/run.stamp
	$(BIN)/python -m eval.sweep --preset results --output $(FIGURES) $(if $(QUICK),--quick)
	$(BIN)/python -m eval.costs --output $(FIGURES)/costs
	$(BIN)/python -m train.power --weights equal $(if $(QUICK),--updates 60 --folder $(FIGURES)/power-equal-rayleigh-0)
	$(BIN)/python -m eval.power_tables --output $(FIGURES)/power $(if $(QUICK),--runs $(FIGURES))
	$(BIN)/python -m eval.figures --sweeps $(FIGURES) --output $(if $(QUICK),$(FIGURES),docs)

# Speed of every stage on this machine, three hours on two cores; `make peers` and `make peer-flax` first to see other
# software beside it. GPU=1 adds larger batches; QUICK=1 tries every stage, most at small
# sizes, in outputs/quick/benchmarks.
ON_GPU := --unet-batches 2 16 --image-batches 1 8
SMALL := --folder outputs/quick/benchmarks --model scenes --batches 256 --envs 64 --gap-updates 0 --captions 50 \
  --image-steps 2 --images 2 --realisations 20 --receptions 10
benchmark: .venv/run.stamp
	$(BIN)/python -m eval.benchmark all --rounds 3 --steps $(if $(QUICK),2,25) $(if $(GPU),$(ON_GPU)) $(if $(QUICK),$(SMALL))
	$(BIN)/python -m eval.benchmark tables $(if $(QUICK),$(SMALL))

# The same on a GPU that is there for minutes only: what matters most first, and in a further call what is missing.
# QUICK=1 tries it on any device, at tiny sizes.
gpu: .venv/run.stamp
	$(BIN)/python -m eval.gpu $(if $(QUICK),--quick --output outputs/quick/gpu)

# For a machine without network that has PyTorch and everything in pyproject.toml but these packages, which go to wheels/
# without what they need.
OFFLINE := clu diffusers docstring_parser Farama-Notifications gymnasium importlib_metadata importlib_resources \
  lazy-importer ml_collections sionna-no-rt stable_baselines3 tensorboardX typeguard tyro
wheels: | .venv/bin/python
	$(PIP) download --quiet --no-deps --only-binary=:all: --python-version 3.12 --constraint constraints.txt \
	  --dest wheels $(OFFLINE)

# Every job compiled for every TPU topology of tpu_configs/ on this machine, no TPU needed: an hour and a half on two cores.
# What benchmarks/aot/ holds already is only traced, so this can be stopped and started again.
aot: .venv/tpu.stamp
	$(BIN)/python -m eval.aot --all --table docs/tpu.md

# The same for one NVIDIA GPU, no GPU needed: a quarter of an hour. Its compiler, 200 MB, goes beside the environment.
aot-gpu: .venv/run.stamp
	test -d .venv/cuda || { $(PIP) install --quiet --no-deps --target .venv/cuda-part \
	  jax-cuda12-pjrt==$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)') && mv .venv/cuda-part .venv/cuda; }
	$(BIN)/python -m eval.aot_gpu --table docs/tpu.md

quality: .venv/run.stamp
	$(BIN)/python -m eval.quality

PYTEST := -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Units, contracts and fast parity: what a change should be tried with every time.
test: .venv/test.stamp
	$(BIN)/python $(PYTEST) -m "not slow"

# Everything: also what starts processes, compiles for TPUs, or needs many samples.
test-all: .venv/test.stamp .venv/tpu.stamp
	$(BIN)/python $(PYTEST)

# Lines and branches of megjax/ that the tests run, those in other processes included; QUICK=1: by `make test`.
coverage: export COVERAGE_FILE := $(CURDIR)/.coverage
coverage: .venv/test.stamp .venv/tpu.stamp
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run $(PYTEST) $(if $(QUICK),-m "not slow")
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --skip-covered

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .pytest_cache .ruff_cache build *.egg-info
