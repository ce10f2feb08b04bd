# Each target works alone on a fresh machine with Python 3.11 or newer: it makes the environment that it needs in .venv.
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
# Files are shared out to two processes; one thread each, or they would wait for one another.
SHARED := OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile

LMMS := .venv-lmms
APP := .venv-app

.PHONY: quickstart test test-slow test-hf test-browser test-lmms lint docs dist constraints clean

quickstart: $(VENV)/.stamp-core
	$(BIN)/ov3 quickstart $(ARGS)

test: lint
	$(SHARED) $(ARGS)

test-slow: $(VENV)/.stamp-dev
	$(SHARED) -m slow $(ARGS)

# pytest's exit code 5 means that there are no such tests
test-hf: $(VENV)/.stamp-dev
	$(PYTEST) -m hf $(ARGS) || [ $$? -eq 5 ]

# Chromium: apt-get install chromium, or CHROMIUM=/path/to/one
test-browser: $(APP)/.stamp
	$(APP)/bin/python -m pytest -m browser $(ARGS)

test-lmms: $(LMMS)/.stamp
	$(LMMS)/bin/python -m pytest -m lmms $(ARGS)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.stamp-dev
	$(BIN)/python docs/api.py build/docs

# The wheel is made of the sdist, in a folder of its own: nothing that merely lies here gets into it.
dist: $(VENV)/.stamp-dev
	rm -rf dist
	$(BIN)/python -m build -o dist .

# Python 3.11 first: it is what constraints.txt was resolved for. Below, --no-compile leaves byte-compiling to the first
# import: of these packages little is ever imported.
$(BIN)/python:
	@for python in $(PYTHON) python3.11 python3.12 python3.13 python3.14 python3; do \
	  if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Making $(VENV) with $$($$python --version)"; $$python -m venv $(VENV); exit; \
	  fi; \
	done; echo "Python 3.11 or newer was not found; name one: make PYTHON=/path/to/python3" >&2; exit 2

$(VENV)/.stamp-core: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing openvision3 and what it needs into $(VENV) (minutes the first time: PyTorch is large)"
	$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-core
	@echo "Installing what lint and tests need into $(VENV)"
	$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt -e '.[eval,vlm,remote,dev]'
	@touch $@

# An environment that lies over $(VENV).
define venv_over
	$(BIN)/python -m venv --clear $(1)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beneath.pth"
endef

# lmms-eval's own environment lies over $(VENV): it adds 1 GB and another protobuf, and takes PyTorch from there.
$(LMMS): $(LMMS)/.stamp

$(LMMS)/.stamp: $(VENV)/.stamp-dev constraints-lmms.txt
	@echo "Installing lmms-eval and what it needs into $(LMMS)"
	$(call venv_over,$(LMMS))
	$(LMMS)/bin/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints-lmms.txt -e '.[vlm,bench]'
	@touch $@

# The app's own environment, likewise: Gradio needs an older Pillow.
$(APP): $(APP)/.stamp

$(APP)/.stamp: $(VENV)/.stamp-dev constraints-app.txt
	@echo "Installing Gradio, playwright and what they need into $(APP)"
	$(call venv_over,$(APP))
	$(APP)/bin/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints-app.txt -e '.[app]' playwright
	@touch $@

# A fresh resolution of the newest versions that pyproject.toml allows; torch and torchvision stay as pinned.
constraints: $(BIN)/python
	grep -E '^(torch|torchvision)==' constraints.txt > constraints.tmp
	$(BIN)/python -m pip install -qq --dry-run --ignore-installed --report report.tmp -c constraints.tmp '.[eval,vlm,remote,dev]'
	{ grep '^#' constraints.txt; $(BIN)/python -c 'import json; print("\n".join(sorted(( \
	  p["name"] + "==" + p["version"] for p in (i["metadata"] for i in json.load(open("report.tmp"))["install"]) \
	  if p["name"] != "openvision3" and not p["name"].startswith(("nvidia-", "cuda-", "triton", "setuptools"))), \
	  key=str.lower)))'; } > new.tmp
	mv new.tmp constraints.txt; rm constraints.tmp report.tmp

clean:
	rm -rf $(VENV) $(LMMS) $(APP) build dist *.egg-info
