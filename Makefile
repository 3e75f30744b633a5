# Two commands set up everything on a fresh machine: `make speedrun` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# Two processes share the cores: threads that wait for others must not spin meanwhile.
TEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: speedrun test check clean

speedrun: .venv/ready  ## raw text to a talking model; e.g. make speedrun ARGS="--depth 6"
	$(BIN)/python -m experiments.speedrun $(ARGS)

test: .venv/ready  ## every test
	$(TEST) $(ARGS)

check: .venv/ready  ## lint, format and the fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(TEST) -m "not slow" $(ARGS)

.venv/ready: pyproject.toml constraints.txt
	@echo "setting up .venv, a few minutes the first time"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv
