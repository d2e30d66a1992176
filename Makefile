# Everything here works from a clean clone with make and a Python of 3.11 or newer: each target first makes
# the virtual environment that it runs in. Servers are those that CLOACINA_DATABASE_URL and
# CLOACINA_BROKER_URL name, else embedded ones.

# Python 3.11 and 3.12 first: for them every dependency comes as a wheel.
PYTHON ?= $(shell for python in python3.12 python3.11 python3 python3.13 python3.14 python; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		&& command -v $$python && break; done)

VENV := .venv
OLDEST := .venv-oldest
# The lowest Celery that pyproject.toml admits.
OLDEST_CELERY := $(shell sed -n 's/.*"celery\[redis\]>=\([0-9.]*\),.*/\1/p' pyproject.toml)

# What pytest is to run, and how: make test ARGS='-k isolation -x'
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo one-to-many test test-oldest bench bench-tenants chaos model lint clean

help:  ## say what there is to make
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.installed  ## load a year of real flights for 16 tenants, kill a worker, check every total
	$(VENV)/bin/python -m examples.flights

one-to-many: $(VENV)/.installed  ## move a deployment on public to a tenant beside others that work
	$(VENV)/bin/python -m examples.one_to_many

test: $(VENV)/.installed  ## run the whole suite on real servers
	$(VENV)/bin/python -m pytest -n 2 $(ARGS)

test-oldest: $(OLDEST)/.installed  ## run it on the oldest supported Celery
	$(OLDEST)/bin/python -m pytest -n 2 $(ARGS)

bench: $(VENV)/.installed  ## compare the speed with that of plain Celery
	$(VENV)/bin/python -m bench $(ARGS)

bench-tenants: $(VENV)/.installed  ## measure what a thousand tenants cost: ARGS='--tenants 10000' for more
	$(VENV)/bin/python -m bench.tenants $(ARGS)

chaos: $(VENV)/.installed  ## kill, freeze, cut and lose for ten minutes, then check every execution
	$(VENV)/bin/python -m cloacina_celery.chaos --seconds 600 --executions 5000 $(ARGS)

model: $(VENV)/.installed  ## go through every small world that the protocol leads to, and tell how broken ones fail
	$(VENV)/bin/python -m tests.model

lint: $(VENV)/.installed  ## check style, types and layers
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

clean:  ## stop the embedded servers; delete their data and all that was made here
	@for folder in .cloacina*; do if [ -d "$$folder" ] && [ -x $(VENV)/bin/python ]; then \
		CLOACINA_DEV_DIR="$$folder" $(VENV)/bin/python -m cloacina_celery.devservers stop; fi; done
	rm -rf $(VENV) $(OLDEST) .cloacina* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache \
		.import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml
	$(call make-venv,$(VENV))

$(OLDEST)/.installed: pyproject.toml
	$(call make-venv,$(OLDEST),'celery[redis]==$(OLDEST_CELERY)')

# $(1) the folder, $(2) what to hold at a version
define make-venv
	@test -n "$(PYTHON)" || { echo "make: no Python of 3.11 or newer with venv and ensurepip is on the PATH;" \
		"install one (on Debian: apt install python3 python3-venv) or name it: make PYTHON=..." >&2; exit 1; }
	@echo "installing into $(1) with $(PYTHON), which takes a minute the first time"
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test,demo]' $(2)
	@touch $@
endef
