# make demo    the main job on a synthetic volume; needs Python >= 3.11 and make only
# make test    the test suite; adds CPU torch
# make check   format, lint, types
# make test-napari   what napari shows of our outputs; installs napari, 320 MB
# make soak    thousands of damaged files, minutes; make docs   what tests write of the documentation

PYTHON ?= python3
DEMO := .venv-demo
TEST := .venv
NAPARI := .venv-napari
PIP_FLAGS := --quiet --disable-pip-version-check

.PHONY: demo test test-napari soak docs check format clean

demo: $(DEMO)/ready
	$(DEMO)/bin/kdunet-infer demo --out demo

test: $(TEST)/ready
	$(TEST)/bin/python -m pytest

soak: $(TEST)/ready
	$(TEST)/bin/python -m pytest -m soak

# napari's own pytest plugins are left out: they warn, and here warnings are errors.
test-napari: $(NAPARI)/ready
	$(NAPARI)/bin/python -m pytest -m napari -p no:napari -p no:npe2 -p no:napari-plugin-engine tests/test_napari_reader.py

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
	rm -rf $(DEMO) $(TEST) $(NAPARI) demo

# No torch here: what a lab installs to segment.
$(DEMO)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/pip install $(PIP_FLAGS) --constraint constraints.txt --editable .
	touch $@

$(NAPARI)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(NAPARI)
	$(NAPARI)/bin/pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[test]' napari-ome-zarr
	touch $@

$(TEST)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[cpu,train,test]'
	touch $@
