# Each command sets up what it needs: a virtual environment with the tested versions, once.
# VENV=path uses or makes another environment; PYTHON=path makes it with another Python (3.10 or newer).
VENV ?= .venv
PYTHON ?= python3
# threads that wait for each other spin by default, which on a busy machine slows small models several times
export OMP_WAIT_POLICY ?= passive
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.remax-lightning-installed
DOCS_INSTALLED := $(VENV)/.remax-lightning-docs-installed
RUN := runs/quickstart

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-fast test-jitter chaos check docs clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv and install the tested set of versions

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[test,check]'
	@touch $@

quickstart: $(INSTALLED) ## SFT, reward model and ReMax on generated toy data; a table and a plot at the end
	@mkdir -p $(RUN) && date +%s > $(RUN)/started_at
	$(PY) cli.py make-toy-data --output_dir $(RUN)/data
	$(PY) cli.py fit --config configs/quickstart/sft.yaml
	$(PY) cli.py fit --config configs/quickstart/reward_model.yaml
	$(PY) cli.py fit --config configs/quickstart/remax.yaml
	$(PY) cli.py test --config configs/quickstart/remax.yaml --ckpt_path last
	$(PY) cli.py report --run_dir $(RUN)/remax --reward_model_dir $(RUN)/reward_model --output_dir $(RUN) \
		--started_at $$(cat $(RUN)/started_at) --reference_label SFT --policy_label ReMax --judge_label gold

# a worker for each CPU, each with one thread; a file stays in one worker, where its tests share what they set up
PYTEST = $(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile
test test-fast test-jitter: export OMP_NUM_THREADS ?= 1

test: $(INSTALLED) ## run all tests
	$(PYTEST)

test-fast: $(INSTALLED) ## run the tests that take a minute or two; what is left out is counted as deselected
	$(PYTEST) -m "not slow"

test-jitter: $(INSTALLED) ## run them where the last bits of matrix products depend on row and shape (tests/jitter.py)
	$(PYTEST) -m "not slow" --jitter --ignore tests/plan  # those measure memory, of which the jitter takes some

chaos: export OMP_NUM_THREADS ?= 1

chaos: $(INSTALLED) ## the faults of tests/chaos with 200 kills at random moments, in an hour; make test has 2 of each case
	$(PY) -m pytest tests/chaos --kills 34

check: $(INSTALLED) ## ruff, mypy, and no copyleft licence among the dependencies
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m piplicenses --from=mixed --partial-match --fail-on="GNU;GPL;Commercial;UNKNOWN" > /dev/null

docs: $(DOCS_INSTALLED) ## build the documentation into site/; a broken link or an unknown name is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

$(DOCS_INSTALLED): $(INSTALLED)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

clean: ## remove .venv, runs and site
	rm -rf $(VENV) runs site
