# Needs Python 3.11 or newer and make. Everything lands in .venv and demo_output.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench drill clean-demo

$(STAMP): setup.py pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "error: $(PYTHON) is older than 3.11; use make PYTHON=python3.12 or similar"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $(STAMP)

demo: $(STAMP)  ## both phases on embedded data; pictures in demo_output/run
	$(BIN)/ray-pipeline train --config configs/demo.yaml $$(test -f demo_output/run/config.yaml && echo --resume)

test: $(STAMP)  ## the whole test suite
	$(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 --durations=15

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)  ## full-size figures; needs 16 GB of free memory and nothing else running
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,bench]"
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/latent_formats.py
	$(BIN)/python benchmarks/stream.py
	$(BIN)/python benchmarks/prepare.py
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/saving.py
	$(BIN)/python benchmarks/restart.py
	$(BIN)/python benchmarks/monitoring.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/choices.py noise-embedding
	$(BIN)/python benchmarks/choices.py hint-control
	$(BIN)/python benchmarks/choices.py noisy-hints

drill: $(STAMP)  ## kill -9 of the encode job and of training at random moments, nodes that come and go, sweeps, the demo as a job, the report, TensorBoard and Ray's dashboard in a browser, a network that is cut; wants root, chromium, prometheus; over an hour
	$(BIN)/python benchmarks/drill_encode.py --kills 10
	$(BIN)/python benchmarks/drill_training.py
	$(BIN)/python benchmarks/drill_elastic.py
	$(BIN)/python benchmarks/drill_sweep.py
	$(BIN)/python benchmarks/drill_report.py
	$(BIN)/python benchmarks/drill_monitoring.py
	$(BIN)/python benchmarks/drill_job.py
	$(BIN)/python benchmarks/drill_network.py

clean-demo:
	rm -rf demo_output
