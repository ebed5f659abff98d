# Every target sets up what it needs in its own virtual environment; nothing is installed elsewhere.
# Another interpreter gets an environment of its own: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
ARGS ?=

.PHONY: serve test reproduce mutants setup-all lint format docs clean

serve: $(VENV)/.base  ## Serve the demo model with 40 % of its experts resident on http://127.0.0.1:8000 (more flags: make serve ARGS="--port 9000")
	$(BIN)/python -m serve.main --expert-memory 40% $(ARGS)

test: $(VENV)/.test  ## The test suite, without a GPU; names what it skips
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

reproduce: $(VENV)/.test  ## Each measured claim of the eMoE paper, measured here (make reproduce ARGS="--quick" in minutes)
	$(BIN)/python -m benchmarks.paper $(ARGS)

mutants: $(VENV)/.test  ## Cut each mechanism out of a copy of the engine; a test has to fail each time (make mutants ARGS="--list")
	$(BIN)/python -m tests.mutants $(ARGS)

setup-all: $(VENV)/.full  ## What `make test` needs to skip nothing but the GPU: torch, Ray, other clients, a browser's driver

lint: $(VENV)/.dev  ## Formatting, linting, types and docstrings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/interrogate emoe_jax serve

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.docs  ## The documentation site, into site/; a broken link or a missing page fails
	$(BIN)/mkdocs build --strict $(ARGS)

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.base: $(VENV)/.venv pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[completion,guided]"
	touch $@

$(VENV)/.full: $(VENV)/.venv pyproject.toml .ci/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable ".[dev,clients,browser,parity,ray]"
	touch $@ $(VENV)/.test $(VENV)/.dev

$(VENV)/.%: $(VENV)/.venv pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV)
