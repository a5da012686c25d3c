# make demo    the main job on a synthetic volume; needs Python >= 3.11 and make only
# make test    the test suite; adds CPU torch
# make check   format, lint, types
# make soak    thousands of damaged files, minutes; make docs   what tests write of the documentation

PYTHON ?= python3
DEMO := .venv-demo
TEST := .venv
PIP_FLAGS := --quiet --disable-pip-version-check

.PHONY: demo test soak docs check format clean

demo: $(DEMO)/ready
	$(DEMO)/bin/kdunet-infer demo --out demo

test: $(TEST)/ready
	$(TEST)/bin/python -m pytest

soak: $(TEST)/ready
	$(TEST)/bin/python -m pytest -m soak

docs: $(TEST)/ready
	KDUNET_WRITE_DOCS=1 $(TEST)/bin/python -m pytest -k 'the_tables_are or the_page_shows'

check: $(TEST)/ready
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/ruff check .
	$(TEST)/bin/mypy

format: $(TEST)/ready
	$(TEST)/bin/ruff format .
	$(TEST)/bin/ruff check --fix .

clean:
	rm -rf $(DEMO) $(TEST) demo

# No torch here: what a lab installs to segment.
$(DEMO)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/pip install $(PIP_FLAGS) --constraint constraints.txt --editable .
	touch $@

$(TEST)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[cpu,train,test]'
	touch $@
