# make demo: create the demo data set, pre-train on it with xID and VICReg, evaluate, report.  make test: run the tests.  Both set up .venv first.
# make test-notebooks: add requirements-notebooks.txt to .venv and run the notebooks.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-notebooks lint clean

$(VENV)/ready: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	touch $@

demo: $(VENV)/ready
	$(RUN) -m datasets.demo --root data/demo
	$(RUN) main-ssl.py configs/demo/xid.yaml
	$(RUN) main-vicreg.py configs/demo/vicreg.yaml
	$(RUN) eval-action-recg-linear.py configs/demo/linear.yaml configs/demo/xid.yaml
	$(RUN) eval-action-recg-linear.py configs/demo/linear.yaml configs/demo/vicreg.yaml
	$(RUN) eval-action-recg-linear.py configs/demo/linear.yaml configs/demo/xid.yaml --random-weights
	$(RUN) -m utils.report demo --out demo.png configs/demo/xid.yaml configs/demo/vicreg.yaml
	$(RUN) -m utils.report checkpoints/demo

test: $(VENV)/ready lint
	$(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder

$(VENV)/notebooks-ready: $(VENV)/ready requirements-notebooks.txt
	$(RUN) -m pip install --quiet -r requirements.txt -r requirements-notebooks.txt
	touch $@

test-notebooks: $(VENV)/notebooks-ready
	$(RUN) -m pytest tests/utils/test_label_similarity.py
	$(RUN) -m tests.notebooks

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
