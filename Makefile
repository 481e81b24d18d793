# `make demo`: trains on scikit-learn's digits, scores the test set, draws digits by their labels; a
# few minutes. Made again, it goes on with what it has.
# SAVE is the folder of runs, FLAGS are further options of the training.
# `make test`: lint and every test that is not marked slow.
# `make clean`: removes .venv, none of the runs.
# PYTHON, of version 3.11 or newer, makes .venv where there is none, or one that can't be used.

PYTHON := python3
PY := .venv/bin/python
SAVE := saved_models
FLAGS :=

.PHONY: demo test clean python

demo: python
	@$(MAKE) --no-print-directory .venv/requirements
	$(PY) train.py --hps digits --desc digits --save_dir $(SAVE) --resume $(FLAGS)
	$(PY) train.py --hps digits --desc digits --save_dir $(SAVE) --test_eval \
		--restore_ema_path $(SAVE)/digits/latest-model-ema.th
	@$(PY) demo.py $(SAVE)/digits

test: export PYTHONDONTWRITEBYTECODE =# hundreds of processes read the modules: compiled once
test: python
	@$(MAKE) --no-print-directory .venv/requirements-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -n auto --dist loadfile -m "not slow"

# Before anything else: a Python that the programs run on. A .venv of another one, or of one that is
# gone, is moved aside.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
python:
	@if ! $(PY) -c '$(NEW_ENOUGH)' 2>/dev/null; then \
		$(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null || { \
			echo "error: Python 3.11 or newer is needed, $(PYTHON) is" \
				"$$($(PYTHON) --version 2>&1 | head -1): name one, make PYTHON=python3.11" >&2; \
			exit 2; }; \
		if [ -e .venv ] || [ -L .venv ]; then \
			aside=.venv-old-$$(date +%Y%m%d-%H%M%S); \
			mv .venv "$$aside"; \
			echo ".venv is of no Python 3.11 or newer: it is $$aside now, a new one is made"; \
		fi; \
	fi

.venv/%: %.txt requirements.txt $(wildcard requirements-explore.txt)
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r $<
	touch $@

clean:
	rm -rf .venv
