# Two commands set up everything on a fresh machine: `make speedrun` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# Two processes share the cores: threads that wait for others must not spin meanwhile.
TEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: speedrun test test-cluster lint check docs tutorials clean

speedrun: .venv/ready  ## raw text to a talking model; e.g. make speedrun ARGS="--depth 6"
	$(BIN)/python -m experiments.speedrun $(ARGS)

test: .venv/ready  ## every test but those of test-cluster
	$(TEST) -m "not cluster" $(ARGS)

test-cluster: .venv/ready  ## several nodes and hosts, whole jobs; hosts need root and iproute2, else it says so and skips
	$(TEST) -rs -m cluster $(ARGS)

lint: .venv/ready  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check

check: lint  ## lint, format, types and the fast tests
	$(TEST) -m "not slow and not cluster" $(ARGS)

.venv/ready: pyproject.toml constraints.txt
	@echo "setting up .venv, a few minutes the first time"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

docs: .venv/docs  ## the site, into site/; a broken link is an error
	$(BIN)/python docs/build_site.py

tutorials: .venv/ready  ## the tutorials' commands, each page in a clone of its own
	$(BIN)/python docs/run_tutorials.py $(ARGS)

.venv/docs: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

clean:
	rm -rf .venv
