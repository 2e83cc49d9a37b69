# make demo   the main job: serve digit images through bursts with four routers, compare, write report.html
# make edge   detection and tracking on four emulated edge nodes, until Ctrl-C (deploy/edge4.toml)
# make test   all tests            make check   format, lint, types, import rules, tests
# make train-env  what training needs, too          make clean   forget the environment
#
# Everything lives in .venv here. PYTHON=... chooses another interpreter (3.11 or newer), EXTRA_PIP="..." adds pip flags.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
RUNTIME := $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(EXTRA_PIP)
INSTALLED_FROM := pyproject.toml setup.py models/resize_passes.c
SYSTEM_PACKAGES := redis-server docker-compose prometheus chromium

.PHONY: demo edge test check lint train-env system-packages clean

demo: .venv/.ready-demo
	$(BIN)/tidegate demo

edge: .venv/.ready-edge
	$(BIN)/tidegate up -f deploy/edge4.toml

test: .venv/.ready-test system-packages
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: lint
	$(MAKE) test

lint: .venv/.ready-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

train-env: .venv/.ready-test

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Tidegate needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "making .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv

.venv/.ready-demo: .venv/bin/python $(INSTALLED_FROM)
	@echo "installing what the demo needs (about a minute the first time)"
	@$(PIP) --editable '.[$(RUNTIME),demo]'
	@touch $@

.venv/.ready-edge: .venv/bin/python $(INSTALLED_FROM)
	@echo "installing what the edge services need (a minute or two the first time)"
	@$(PIP) --editable '.[$(RUNTIME),demo,edge]'
	@$(PIP) --no-deps trackers==2.6.1 trackeval==1.3.0
	@touch $@ .venv/.ready-demo

.venv/.ready-test: .venv/bin/python $(INSTALLED_FROM)
	@echo "installing what the tests need (a few minutes the first time)"
	@$(PIP) torch==2.13.0
	@$(PIP) --editable '.[$(RUNTIME),demo,train,edge,place,openvino,test,dev]'
	@$(PIP) --no-deps torchvision==0.28.0 timm==1.0.31 trackers==2.6.1 trackeval==1.3.0
	@touch $@ .venv/.ready-demo .venv/.ready-edge

# Real redis-server, docker-compose and others for the tests that need them; elsewhere those are skipped by name.
system-packages:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  missing=""; for p in $(SYSTEM_PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	  if [ -n "$$missing" ]; then echo "installing$$missing for the tests"; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi; fi

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
