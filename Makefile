# Everything this file makes lives in .venv, ./demo, temporary directories, and (as root) Debian packages.

# Distributions build their interpreter with profile-guided optimisation, which makes the data path up to 15 % faster;
# one built by hand, first in PATH, often lacks it.
USABLE = $(1) -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(1)
PYTHON ?= $(or $(shell $(call USABLE,/usr/bin/python3)),python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help run test check soak guest bench clean bytecode

help:
	@echo "make run     start a daemon that exports a demo disk over NBD (until Ctrl-C)"
	@echo "make test    run all tests"
	@echo "make check   ruff, mypy --strict and the layer rule"
	@echo "make soak    kill -9 under load, ROUNDS=100 times; models and power cuts with EFFORT=10 times as much"
	@echo "make guest   kill a Linux guest and its daemon, ROUNDS=100 times; needs 250 MB of packages"
	@echo "make bench   compare speed with the reference daemon; writes bench/results/"
	@echo "make clean   remove .venv, ./demo and caches"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || tools/packages python3-venv
	$(PYTHON) -m venv $(VENV)

# The daemon alone, then with what the tests and checks need. The stamps say which is installed. pyfuse3 is built
# from source; where that cannot be done, the tests of the view are skipped.
$(VENV)/.qsd: pyproject.toml | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.qsd-all: pyproject.toml | $(BIN)/python
	@tools/packages libfuse3-dev pkg-config gcc python3-dev
	$(PIP) --editable '.[all]' || $(PIP) --editable '.[compress,crypto,test,dev]'
	@touch $@ $(VENV)/.qsd

# An installed package has its bytecode beside it; an editable one on a machine that writes none
# (PYTHONDONTWRITEBYTECODE) would compile 110 modules at every start, which takes 100 ms.
bytecode: $(VENV)/.qsd
	@$(BIN)/python -m compileall -q qsd

run: bytecode
	@$(BIN)/python tools/demo.py

test: $(VENV)/.qsd-all bytecode
	@tools/packages qemu-utils libnbd-bin python3-libnbd nbdkit fio fuse3 e2fsprogs xfsprogs
	$(BIN)/python -m pytest -q

check: $(VENV)/.qsd-all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict qsd
	$(BIN)/python -m pytest -q tests/unit/test_layers.py

ROUNDS ?= 100
EFFORT ?= 10
soak: $(VENV)/.qsd-all bytecode
	@tools/packages qemu-utils
	$(BIN)/python tests/daemon/soak.py $(ROUNDS)
	QSD_EFFORT=$(EFFORT) $(BIN)/python -m pytest -q tests/actors/test_qcow2_*.py tests/daemon/test_qcow2_model.py tests/daemon/test_qmp_sequences.py

guest: $(VENV)/.qsd-all bytecode
	@tools/packages qemu-utils qemu-system-x86 busybox-static linux-image-cloud-amd64 e2fsprogs
	$(BIN)/python tests/daemon/guest_soak.py $(ROUNDS)

bench: $(VENV)/.qsd-all bytecode
	@tools/packages qemu-utils libnbd-bin fio
	$(BIN)/python -m bench $(GROUP)

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
