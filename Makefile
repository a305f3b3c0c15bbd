# Two commands for a new user: `make demo` and `make test`. Both set up the virtual environment first.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)

DEMO_VIDEOS := $(BIN)/python -m data_prep synthetic --out build/demo-data --plain --width 64 --height 64 --frames 32
DEMO_FINETUNE := $(BIN)/python -m arvideo_dist.finetune --config jobs/demo-finetune.yaml
DEMO_VIEWS := --views 1x1 --evaluation.videos_per_batch 16 --cluster.workers 2 --cluster.device cpu --data.workers 1

.PHONY: setup demo test test-slow test-faults check format clean

setup: $(VENV)/.complete

$(VENV)/.complete: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 is missing: install python3.11 (and its venv module), or run 'make PYTHON=/path/to/python3.11 ...'"; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11: run 'make PYTHON=/path/to/python3.11 ...'"; exit 2; }
	@"$(PYTHON)" -c 'import venv, ensurepip' || { echo "$(PYTHON) has no venv module: install it (Debian: apt-get install python3.11-venv)"; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(DEMO_VIDEOS) --split train --num-videos 1024 --seed 1
	$(DEMO_VIDEOS) --split labelled --num-videos 192 --seed 2
	$(DEMO_VIDEOS) --split val --num-videos 480 --seed 3
	$(BIN)/python -m arvideo_dist.pretrain --config jobs/demo.yaml
	$(DEMO_FINETUNE) --run.name demo-pretrained --init-from runs/demo
	$(DEMO_FINETUNE) --run.name demo-scratch --init-from none
	$(BIN)/python -m arvideo_dist.evaluate runs/demo-pretrained $(DEMO_VIEWS)
	$(BIN)/python -m arvideo_dist.evaluate runs/demo-scratch $(DEMO_VIEWS)
	$(BIN)/python jobs/compare.py runs/demo-pretrained runs/demo-scratch

test: setup
	$(BIN)/pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: setup
	$(BIN)/pytest -m slow --timeout 3600

test-faults: setup
	$(BIN)/pytest tests/faults --timeout 1800

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  # what this Makefile made; never runs/, where trainings are
	rm -rf $(VENV) build
