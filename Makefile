# make demo: a topographic GPT-2 trained on real text, from a fresh clone.  make app: look at what its layers know.  make test: the tests.
# Each does its own set-up.
PYTHON ?= python3
SHELL = /bin/bash
BIN = .venv/bin
RESUME = $$(test -f $(1)/ckpt.pt && echo init_from=resume)

# what runs a script: CMD="sbatch config/slurm/submit.sh" hands it to a cluster, whatever it takes in front
CMD ?= $(BIN)/python

.PHONY: setup demo app neural-conv test test-all

setup: .venv/ready

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12, say" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	touch $@

# an interrupted demo continues where it was; a finished one shows its results again
demo: setup
	$(BIN)/python data/pydocs/prepare.py
	$(BIN)/python train.py $(call RESUME,out/train)
	$(BIN)/python sample.py prompt="The function returns" max_new_tokens=100
	$(BIN)/python topography.py
	@echo
	@echo "loss curve:   out/train/loss.png"
	@echo "the sheets:   out/train/sheets.png"
	@echo "contrasts:    out/topography/map_sentences_nonwords.png, summary.png"

# listens on this machine only; shows what is in out/, and a small example until there is something
app: setup
	$(BIN)/streamlit run probe.py --server.address localhost --browser.gatherUsageStats false

# Podcast ECoG to word embeddings; once before: python data/podcast/prepare.py subjects=3.  OPTIONS="seed=2 trial_name=again" goes on to the script
neural-conv: setup
	mkdir -p logs
	set -o pipefail; $(CMD) decode.py config/decode_podcast.yaml $(OPTIONS) 2>&1 | tee logs/neural-conv.out

test: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# the slow ends, too
test-all: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
