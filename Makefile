# make demo    set up .venv and run the main job
# make test    set up .venv, lint, and run the tests
# make test-all   also what is tested on some models by default, on every model (an hour)
# make sanitize   the tests of CUDA streams and captured steps under compute-sanitizer (needs a GPU and the CUDA toolkit)
# make browser   the example that trains in a browser tab, into the folder site
# make zoo     set up .venv with timm, transformers and accelerate, and measure every model of the zoo (an hour)
# make zoo-smoke   the same for twenty of them
# PYTHON names the interpreter that .venv is made with: make test PYTHON=python3.12

PYTHON ?= python3
PYTEST_FLAGS ?= -n auto --maxprocesses 8 --dist worksteal

VENV := .venv
PAGE := targets/page
BROWSER := examples/browser
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --constraint constraints.txt
SETUP := pyproject.toml setup.py constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-all sanitize browser zoo zoo-smoke lint types imports format dist clean

help:
	@sed -n 's/^# //p' Makefile

demo: $(VENV)/.demo $(PAGE)/vendor
	$(BIN)/graphlocal demo

test: lint $(PAGE)/vendor $(BROWSER)/vendor
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-fast: $(VENV)/.test $(PAGE)/vendor
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not slow and not exhaustive"

test-all: lint $(PAGE)/vendor
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m ""

sanitize: $(VENV)/.test
	$(BIN)/python tests/sanitize.py

browser: $(VENV)/.test $(BROWSER)/vendor
	$(BIN)/python $(BROWSER)/make.py --out site

zoo: $(VENV)/.zoo
	$(BIN)/python -m benchmarks.zoo

zoo-smoke: $(VENV)/.zoo
	$(BIN)/python -m benchmarks.zoo --smoke

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory types imports

# mypy can't follow package_dir, so it checks a folder of links that looks like the installed package.
types: $(VENV)/.test
	@rm -rf build/types && mkdir -p build/types/graphlocal
	@ln -s "$(CURDIR)"/graphlocal/* "$(CURDIR)/passes" "$(CURDIR)/targets" build/types/graphlocal/
	cd build/types && "$(CURDIR)/$(BIN)/mypy" --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p graphlocal

imports: $(VENV)/.test
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_imports.py -k "order"

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dist: $(VENV)/.test $(PAGE)/vendor
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) $(PAGE)/vendor $(PAGE)/node_modules $(BROWSER)/vendor tests/vendor build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Set-up, once: a stamp in .venv is newer than what it was made from.

# torch comes first and by itself, so that pip takes the CPU build where one is configured.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("graphlocal needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(SETUP)
	$(INSTALL) --quiet --editable '.[demo]'
	@touch $@

# The tests' models come from torchvision. Its dependencies would replace a CPU build of torch.
$(VENV)/.test: $(VENV)/.torch $(SETUP)
	$(INSTALL) --quiet --editable '.[demo,dev,onnx]'
	$(INSTALL) --quiet --no-deps torchvision
	@touch $@ $(VENV)/.demo

$(VENV)/.zoo: $(VENV)/.test
	$(INSTALL) --quiet transformers accelerate
	$(INSTALL) --quiet --no-deps timm
	@touch $@

# The libraries that the partition page draws with. Without npm there is no page, and all else works.
$(PAGE)/vendor: $(PAGE)/package.json $(PAGE)/package-lock.json $(PAGE)/bundle.js
	@if command -v npm >/dev/null; then cd $(PAGE) && npm ci --omit=dev --ignore-scripts --no-audit --no-fund && npm run bundle; \
	else echo "npm is missing: graphlocal works without it, but can't write partition pages (install Node.js)"; fi

# What the browser example runs on: a large download, which only it needs. Not while the other rule is in that folder.
$(BROWSER)/vendor: $(PAGE)/package.json $(PAGE)/package-lock.json $(PAGE)/bundle-browser.js | $(PAGE)/vendor
	@if command -v npm >/dev/null; then cd $(PAGE) && npm ci --ignore-scripts --no-audit --no-fund && npm run bundle-browser; \
	else echo "npm is missing: the browser example can't be made (install Node.js)"; fi
