# Two commands do it all: `make demo` prunes a clip, `make test` runs the tests. Both set everything up first.
#
# CONSTRAINTS pins the small CPU build of torch. On a machine with a CUDA GPU, take pip's newest build instead:
#     make demo CONSTRAINTS=/dev/null
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
INSTALLED = $(VENV)/installed

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(VENV)/bin/autogaze demo -o outputs/demo

test: lint
	$(VENV)/bin/python -m pytest

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) outputs
