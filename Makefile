# `make demo`: trains on scikit-learn's digits, scores the test set, shows samples; a few minutes.
# SAVE is the folder of runs, FLAGS are further options of the training.
# `make test`: lint and every test that is not marked slow.

PY := .venv/bin/python
SAVE := saved_models
FLAGS :=

.PHONY: demo test clean

demo: .venv/requirements
	$(PY) train.py --hps digits --desc digits --save_dir $(SAVE) $(FLAGS)
	$(PY) train.py --hps digits --desc digits --save_dir $(SAVE) --test_eval \
		--restore_ema_path $(SAVE)/digits/latest-model-ema.th
	@echo "samples: $$(ls -t $(SAVE)/digits/samples-*.png | head -1)"

test: .venv/requirements-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -n auto --dist loadfile -m "not slow"

.venv/%: %.txt requirements.txt
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install --quiet -r $<
	touch $@

clean:
	rm -rf .venv saved_models
