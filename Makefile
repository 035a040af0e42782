# The interpreter that .venv is made of: make quickstart PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
QUICKSTART := --config configs/quickstart.py --workdir runs/quickstart

.PHONY: quickstart test test-slow lint

quickstart: $(VENV)/.ready
	$(RUN) main.py $(QUICKSTART) --mode train
	$(RUN) main.py $(QUICKSTART) --mode eval

test: $(VENV)/.ready
	$(RUN) -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.ready
	$(RUN) -m pytest -m slow

lint: $(VENV)/.ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# The stamp is written last, so an interrupted installation is taken up again.
# tests/test_packaging.py says that requirements.txt agrees with pyproject.toml.
$(VENV)/.ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: \
	Python 3.11 or newer is needed: make PYTHON=python3.12, say.")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	@touch $@
