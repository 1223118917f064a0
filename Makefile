# Every target sets up what it needs, on a machine that has nothing but Python 3.11+ and make.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Touched when $(VENV) holds what pyproject.toml and constraints.txt ask for.
STAMP := $(VENV)/.complete
# Arguments for one run: `make test ARGS="-k placement -x"`.
ARGS ?=
PY_DIRS := $(wildcard client server tests examples benchmarks proto docs)

export PYTHONUNBUFFERED := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Minutes that `make fuzz` takes.
MINUTES ?= 2

.PHONY: help setup demo test check format bench fuzz test-compose proto docs clean distclean

help:  ## say what there is (the default)
	@echo "epmesh: expert-parallel all-to-all as a service"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'
	@echo
	@echo "Start with \`make demo\`, then \`make test\`."

setup: $(STAMP)  ## make .venv with everything in it (the other targets do this by themselves)
	@echo "setup: $(VENV) is complete; the command is $(BIN)/epmesh"

$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "setup: no '$(PYTHON)' here; install Python 3.11 or 3.12, or say PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "setup: $$("$(PYTHON)" --version) is too old, 3.11 or later is needed; say PYTHON=python3.11, for one" >&2; exit 1; }
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    echo "setup: making $(VENV) with $$("$(PYTHON)" --version)"; \
	    "$(PYTHON)" -m venv --clear $(VENV) \
	        || { echo "setup: 'python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	fi
	@echo "setup: installing epmesh[server,examples,dev] into $(VENV) (the first time this takes some minutes; torch is large)"
	@$(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[server,examples,dev]' 2>$(VENV)/install.err \
	    | tee $(VENV)/install.log | sed -un 's/^Collecting \([^ ]*\).*/  getting \1/p; s/^Installing collected packages.*/  installing them/p' \
	    || { tail -n 20 $(VENV)/install.log $(VENV)/install.err >&2; echo "setup: FAIL (whole output: $(VENV)/install.log)" >&2; exit 1; }
	@touch $@
	@echo "setup: done"

demo: $(STAMP)  ## a real mixture-of-experts model over two nodes, by ranks, then by routers; ends with demo: PASS
	@echo "demo: a mixture-of-experts language model, its experts spread over two nodes; first by ranks, then by routers"
	@$(BIN)/epmesh demo $(ARGS)

test: $(STAMP)  ## unit, integration and fault tests, with real processes; ARGS="-k word" picks some
	@echo "test: unit tests first, then real node services, coordinators and ranks on loopback"
	@if $(BIN)/python -m pytest $(ARGS); then echo "test: PASS"; else echo "test: FAIL"; exit 1; fi

check: $(STAMP)  ## formatting, lint and strict types; changes nothing
	@failed=""; \
	echo "check: ruff format --check"; $(BIN)/ruff format --check $(PY_DIRS) || failed+=" format"; \
	echo "check: ruff check";          $(BIN)/ruff check $(PY_DIRS)          || failed+=" lint"; \
	echo "check: mypy --strict";       $(BIN)/mypy                           || failed+=" types"; \
	if [ -z "$$failed" ]; then echo "check: PASS"; else echo "check: FAIL ($${failed# }; \`make format\` mends what can be mended by itself)"; exit 1; fi

format: $(STAMP)  ## let ruff format and mend the sources
	@$(BIN)/ruff check --fix --exit-zero --quiet $(PY_DIRS)
	@$(BIN)/ruff format $(PY_DIRS)

bench: $(STAMP)  ## dispatch + combine beside all-gather/reduce-scatter over Gloo, in one run
	@$(BIN)/epmesh bench $(ARGS)

fuzz: $(STAMP)  ## random bytes against all that reads from outside, for MINUTES=2; ends with fuzz: PASS
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install -q -c constraints.txt -e '.[fuzz]' 2>/dev/null \
	    || echo "fuzz: atheris does not install here; inputs are mutated without its guidance"
	@$(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(ARGS)

test-compose: $(STAMP)  ## the images and a mesh of containers: killed, paused, cut off, replaced, restarted
	@PYTHON="$(CURDIR)/$(BIN)/python" docker/test-compose.sh $(ARGS)

proto:  ## regenerate the stubs under client/epmesh/v1 from proto/
	@PYTHON="$(PYTHON)" proto/generate.sh client
	@echo "proto: client/epmesh/v1 is what proto/ says"

docs:  ## regenerate docs/api.md from the docstrings
	@"$(PYTHON)" docs/generate_api.py

clean:  ## remove caches and build output
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -path './.venv*' -prune -o -type d -name __pycache__ -print0 | xargs -0 rm -rf
	@echo "clean: done ($(VENV) is kept; \`make distclean\` removes it too)"

distclean: clean  ## and the virtual environments
	@rm -rf .venv .venv-proto
	@echo "distclean: done"
