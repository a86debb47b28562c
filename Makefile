# make demo     the main job on the embedded default, from nothing      make demo NAME=小明 AUTHOR=小红
# make test     lint, types, floors and the fast tests                  make test-all adds the slow ones
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
NAME   ?= 小智
AUTHOR ?= 开源社区

.PHONY: demo test test-all mutants faults fuzz lint lock tiny clean

$(BIN)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(BIN)/.installed
	$(BIN)/python -m glmft.train data.fill.name="$(NAME)" data.fill.author="$(AUTHOR)"

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

test: lint
	$(BIN)/pytest -m "not slow"

test-all: lint
	$(BIN)/pytest

mutants: $(BIN)/.installed
	$(BIN)/python tests/mutants.py

faults: $(BIN)/.installed
	$(BIN)/python tests/faults/harness.py --faults $(or $(N),400) --seed $(or $(SEED),1)

fuzz: $(BIN)/.installed
	$(BIN)/python tests/faults/fuzz.py

lock: constraints.txt  # needs uv; torch and what belongs to its build are left out
	{ sed -n "/^#/p" requirements.lock; uv pip compile pyproject.toml -c constraints.txt --generate-hashes \
	  --python-version 3.11 --no-emit-package torch --no-header --no-annotate \
	  | awk '/^[a-z0-9]/ { keep = !/^(cuda-|nvidia-|triton=|setuptools=)/ } keep'; } > .lock && mv .lock requirements.lock

tiny: $(BIN)/.installed
	$(BIN)/python experiments/tiny_base/make.py

clean:
	rm -rf $(VENV) .tiny dist
