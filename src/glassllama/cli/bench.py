"""`glassllama bench`: how fast a model runs here, and how fast it could run at best."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glassllama.base.errors import GenerationError, GlassError, MissingExtraError, quoted
from glassllama.cli.console import print_json, progress_bars
from glassllama.cli.files import naming
from glassllama.cli.options import How, Json, ModelArgument, Offline, PreferPth, Which

if TYPE_CHECKING:
    from glassllama.cli.bench_runner import Contestant, Grid

WHOLE_GRID = {"prompt": "128,512,2048", "context": "0,1024,4096", "batch": "1,4,8"}


class PeerName(StrEnum):
    llama_cpp = "llama.cpp"
    as_stored = "llama.cpp-as-stored"


def numbers(text: str) -> str:
    """`128,512` -> the same; anything that is no list of whole numbers is a usage error."""
    if not all(part.isdecimal() for part in text.split(",")):
        raise typer.BadParameter(f"expected whole numbers with commas between, got {quoted(text)}")
    return text


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What is to be measured."""

    prompt: Annotated[
        str, typer.Option(metavar="N,…", callback=numbers, help="Tokens of a prompt: prefill.")
    ] = "512"
    context: Annotated[
        str,
        typer.Option(
            metavar="N,…", callback=numbers, help="Tokens that are there already: decode."
        ),
    ] = "0"
    batch: Annotated[
        str, typer.Option(metavar="N,…", callback=numbers, help="Rows side by side: decode.")
    ] = "1"
    grid: Annotated[
        bool,
        typer.Option(
            "--grid",
            help="Instead: prompts of {prompt}, contexts of {context}, batches of {batch}.".format(
                **WHOLE_GRID
            ),
        ),
    ] = False
    new: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens made one by one, for a decode.")
    ] = 64
    runs: Annotated[
        int, typer.Option(min=1, metavar="N", help="Runs, of which the median counts.")
    ] = 3

    def as_grid(self) -> Grid:
        from glassllama.cli.bench_runner import Grid

        texts = WHOLE_GRID if self.grid else asdict(self)
        prompts, contexts, batches = (
            [*map(int, texts[name].split(","))] for name in ("prompt", "context", "batch")
        )
        return Grid(
            prompts=prompts, contexts=contexts, batches=batches, new=self.new, runs=self.runs
        )


def bench(
    model: ModelArgument,
    how: How,
    questions: Questions,
    vs: Annotated[
        list[PeerName] | None,
        typer.Option(
            metavar="PEER",
            help="llama.cpp: in turns with it, on the same GGUF file. llama.cpp-as-stored: the "
            "same without repacking the weights for this CPU. May be given twice.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Add the result to FILE, as one line of JSON."),
    ] = None,
    offline: Offline = False,
    pth: PreferPth = False,
    json: Json = False,
) -> None:
    """Measure a model on this machine: load, first token, prefill, decode, memory.

    The bounds are measured at the same time. Every new token has to read all weights once, so
    decode of one row cannot be faster than memory gives them; a prefill cannot be faster than the
    processor multiplies. Prompts are random tokens, and no token is guessed (no speculation).
    """
    from glassllama.cli.bench_runner import measure, threads_of
    from glassllama.cli.bench_table import print_measured

    llm = how.load(Which(model=model, offline=offline, pth=pth))
    peers: list[Contestant] = [LlamaCpp(llm.path, threads_of(how), peer) for peer in vs or ()]
    with progress_bars() as bar:
        measured = measure(llm, how, questions.as_grid(), peers, bar("measuring", "cells"))
    if out is not None:
        with naming(out), out.open("a", encoding="utf-8") as file:
            file.write(dumps(asdict(measured)) + "\n")
    if json:
        print_json(asdict(measured))
    else:
        print_measured(measured)


class LlamaCpp:
    """llama.cpp by way of llama-cpp-python's bindings, on the same file with as many threads.

    Its defaults otherwise. Rows are sequences of one context: llama_decode takes them together.
    """

    def __init__(self, path: Path, threads: int, kind: PeerName = PeerName.llama_cpp) -> None:
        """Raises MissingExtraError; GlassError where it cannot read the file."""
        started = time.perf_counter()
        try:
            import llama_cpp
        except ImportError:
            raise MissingExtraError("the comparison with llama.cpp", "bench") from None
        from glassllama.formats.first_bytes import format_of  # NumPy: only when it is needed

        if format_of(path) != "gguf":
            raise GlassError(f"{path}: llama.cpp reads GGUF files only, leave out --vs")
        self._cpp: Any = llama_cpp
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silent, None)
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.use_extra_bufts = kind is PeerName.llama_cpp  # repack what it can
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise GlassError(f"{path}: llama.cpp {llama_cpp.__version__} cannot load it")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._words = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._threads, self._at_once = threads, 0  # tokens of a call
        self._context: Any = None
        self._pieces: Any = None  # the tokens of a call, in their own words
        self._lengths: list[int] = []  # tokens of each row
        self.name = f"{kind.value} {llama_cpp.__version__}"
        self.built_with = llama_cpp.llama_print_system_info().decode().strip(" |")
        self.load_s = time.perf_counter() - started

    def begin(self, batch: int, room: int) -> None:
        if self._context is not None:
            self._cpp.llama_free(self._context)
            self._cpp.llama_batch_free(self._pieces)
        settings = self._cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = room * batch, batch
        settings.n_threads = settings.n_threads_batch = self._threads
        self._context = self._cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise GenerationError(f"{self.name} has no room for {batch} rows of {room} tokens")
        self._at_once = int(settings.n_batch)
        self._pieces = self._cpp.llama_batch_init(self._at_once, 0, 1)
        self._lengths = [0] * batch

    def feed(self, ids: list[int]) -> None:
        for first in range(0, len(ids), self._at_once):
            some = [*enumerate(ids)][first : first + self._at_once]
            self._decode([(id, 0, n == len(ids) - 1) for n, id in some])

    def rewind(self, length: int) -> None:
        memory = self._cpp.llama_get_memory(self._context)
        for row in range(len(self._lengths)):
            self._cpp.llama_memory_seq_rm(memory, row, length, -1)
            self._lengths[row] = length

    def decode(self, new: int) -> None:
        from glassllama.cli.bench_runner import FIRST

        ids = [FIRST + row for row in range(len(self._lengths))]
        for _ in range(new):
            self._decode([(id, row, True) for row, id in enumerate(ids)])
            ids = list(self._likeliest())

    def _decode(self, tokens: list[tuple[int, int, bool]]) -> None:
        """(id, row, whether its logits are wanted) of each, in one call."""
        pieces = self._pieces
        pieces.n_tokens = len(tokens)
        for n, (id, row, wanted) in enumerate(tokens):
            pieces.token[n], pieces.pos[n], pieces.logits[n] = id, self._lengths[row], wanted
            pieces.n_seq_id[n], pieces.seq_id[n][0] = 1, row
            self._lengths[row] += 1
        if self._cpp.llama_decode(self._context, pieces) != 0:
            raise GenerationError(f"{self.name} failed on {len(tokens)} tokens")

    def _likeliest(self) -> Iterator[int]:
        import numpy as np

        for row in range(len(self._lengths)):
            logits = self._cpp.llama_get_logits_ith(self._context, row)
            yield int(np.ctypeslib.as_array(logits, (self._words,)).argmax())
