# `make demo`: trains on scikit-learn's digits, scores the test set, shows samples; a few minutes.
# `make test`: lint and every test that is not marked slow.

PY := .venv/bin/python
RUN := saved_models/digits

.PHONY: demo test clean

demo: .venv/requirements
	$(PY) train.py --hps digits --desc digits
	$(PY) train.py --hps digits --desc digits --restore_ema_path $(RUN)/latest-model-ema.th --test_eval
	@echo "samples: $$(ls -t $(RUN)/samples-*.png | head -1)"

test: .venv/requirements-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -m "not slow"

.venv/%: %.txt requirements.txt
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install --quiet -r $<
	touch $@

clean:
	rm -rf .venv saved_models
