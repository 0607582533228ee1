# make demo: set up and run the main job.  make test: set up and pass the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check
# Also reaches the environments in which pip builds.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: demo test lint traces clean

demo: $(VENV)/core.stamp
	$(BIN)/epsim compare scenarios/orin-2x-olmoe.yaml \
		--axis homes.policy=balanced,by_modality \
		--axis placement.policy=contiguous,modality_bins \
		--axis transmission.mode=sync,async \
		--axis transmission.dedup=none,device
	$(BIN)/epsim simulate scenarios/orin-2x-olmoe.yaml --out out/demo
	$(BIN)/epsim compare scenarios/digits.yaml \
		--axis trace=traces/digits-soft.arrow,traces/digits-attention.arrow,traces/digits-gaussian.arrow \
		--axis placement.policy=contiguous,modality_bins
	$(BIN)/epsim place traces/digits-gaussian.arrow --scenario scenarios/digits-2x4.yaml --seeds 3 \
		--policy contiguous --policy coactivation --policy balanced_coactivation --policy predicted_time

test: $(VENV)/dev.stamp lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder -m 'not alone'
	$(BIN)/python -m pytest -m alone

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The traces that ship, made anew: trains six small models on the CPU, some ten minutes on two idle cores.
TRACED := soft attention gaussian smar hard moiie
traces: $(VENV)/dev.stamp
	$(BIN)/epsim study specialise -o out/traces --seeds 1 --methods $(shell echo $(TRACED) | tr ' ' ',')
	for method in $(TRACED); do cp out/traces/seed-0/$$method.arrow traces/digits-$$method.arrow; done

# The last line of each set-up compiles the numba kernels into the cache, once.
$(VENV)/core.stamp: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "epsim needs Python 3.11 or newer; run: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	$(BIN)/python -m epsim.warm_up
	touch $@

$(VENV)/dev.stamp: $(VENV)/core.stamp
	$(INSTALL) --editable '.[dev,trace,plot]'
	touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
