# `make run` and `make test` do all the set-up themselves, in .venv; they need Python 3.11 or newer and make.

PYTHON ?= python3
CORES ?= 2
VENV := .venv
SNAKEMAKE := $(VENV)/bin/snakemake --logger cxt --cores $(CORES) --rerun-incomplete --show-failed-logs

.PHONY: help run all test test-slow test-all test-resume test-cluster test-fuzz record docs report lint format clean

help:
	@echo "make run    simulate, preprocess and train up to results/broad_w200.ckpt, and print the accuracy table"
	@echo "make all    all six checkpoints and their evaluation"
	@echo "make test   the quick tests"
	@echo "make test-slow      the tests that take seconds each, whole workflows and interrupted training"
	@echo "make test-all       all tests, also those that take half a minute to minutes each"
	@echo "make test-resume    interrupted training, twenty kills of each kind: takes long"
	@echo "make test-cluster   the workflow on a Slurm of its own, by the shipped profile"
	@echo "make test-fuzz      two hundred random damages to each kind of file: some ten minutes"
	@echo "make report  figures, table, the graph of rules and run times as a page: build/report.zip"
	@echo "make docs   the documentation site, in build/site"
	@echo "make lint   ruff, the order of imports, types, snakefmt, and snakemake --lint"
	@echo "CORES=8 make run uses more cores"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .[all]
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .[dev]
	touch $@

run: $(VENV)/installed
	$(SNAKEMAKE) results/broad_w200.ckpt results/evaluation/broad.json results/evaluation/broad_w200.json
	@$(VENV)/bin/python -m cxt.evaluate --table results/evaluation/broad.json results/evaluation/broad_w200.json

all: $(VENV)/installed
	$(SNAKEMAKE)
	@cat results/evaluation/table.md

# All six checkpoints first, if they are not there.
report: $(VENV)/installed
	$(SNAKEMAKE)
	mkdir -p build
	$(VENV)/bin/snakemake --report build/report.zip
	@echo "build/report.zip"

# The whole matrix of interrupted training, with twenty kills and twenty signals each: some four hours. With the line below and
# `-k once_each`, one combination of each kind of training.
test-resume: $(VENV)/installed-dev
	CXT_RESUME_KILLS=20 $(VENV)/bin/python -m pytest -s tests/resume/test_resume.py tests/resume/test_interrupts.py

# A Slurm of its own on this machine, of Debian's packages munge, slurmctld and slurmd: half an hour, as root. Allocations of other
# lengths: CXT_SLURM_MINUTES=2,10,20.
test-cluster: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest -o faulthandler_timeout=7200 tests/cluster

test-fuzz: $(VENV)/installed-dev
	CXT_FUZZ_MUTATIONS=200 $(VENV)/bin/python -m pytest tests/unit/test_fuzz.py

# After a change of a stage's output that is meant.
record: $(VENV)/installed-dev
	PYTHONPATH=tests $(VENV)/bin/python tests/workflow/test_stage_outputs.py --record

# Passive, because the threads of several tests share the cores.
test: $(VENV)/installed-dev
	OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest --numprocesses $(CORES) --dist worksteal --durations 30 -m "not slow and not long"

# The rest of what .ci/run runs.
test-slow: $(VENV)/installed-dev
	OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest --numprocesses $(CORES) --dist worksteal --durations 30 \
		-m "slow and not long"

# All, also those that take half a minute to minutes each.
test-all: $(VENV)/installed-dev
	OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest --numprocesses $(CORES) --dist worksteal --durations 30

# Strict: a broken link or reference is an error.
docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html"

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache --no-logo
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/snakefmt --check Snakefile rules workflow
	$(VENV)/bin/snakemake --lint

format: $(VENV)/installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/snakefmt Snakefile rules workflow

clean:
	rm -rf $(VENV)
