# Two commands do everything on a machine that has Python 3.11 or newer and make:
#   make demo    protect real images, measure what that is worth, print where the report lies
#   make test    every check but the long ones (make test-slow)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := demo-run

.PHONY: demo test test-slow lint clean

demo: $(VENV)/demo
	rm -rf $(DEMO)
	$(BIN)/python examples/digits.py $(DEMO)/digits
	$(BIN)/privet protect $(DEMO)/digits/train --out $(DEMO)/protected --method sem --preset cpu \
	    --set flip=no --set train_steps=400 --set decay_steps=400
	$(BIN)/privet show $(DEMO)/digits/train $(DEMO)/protected --out $(DEMO)/strips.png
	$(BIN)/privet audit $(DEMO)/digits/train $(DEMO)/protected --test $(DEMO)/digits/test --out $(DEMO)/audit \
	    --preset cpu --no-flip --architectures resnet8,vgg11-w16 --recoveries none,jpeg-10 --epochs 12

test: lint
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -n 2 -m slow

lint: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO)

$(VENV)/%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("privet needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@
