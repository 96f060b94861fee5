"""All verbs as one Typer application."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable
from textwrap import shorten
from types import ModuleType
from typing import Any

import typer
from typer.core import TyperGroup

from glassllama import __version__
from glassllama.base.errors import QUOTED_CHARACTERS
from glassllama.cli.bench import bench
from glassllama.cli.console import compile_notice
from glassllama.cli.describe import classify, describe
from glassllama.cli.errors import WRONG_USAGE, print_error
from glassllama.cli.generate import chat, generate
from glassllama.cli.models import download, list_models, show, validate
from glassllama.cli.options import with_fields_as_options
from glassllama.cli.tokens import next_tokens, perplexity, tokenize
from glassllama.cli.train import train
from glassllama.cli.train_tokenizer import train_tokenizer
from glassllama.cli.walkthrough import walkthrough

VERBS: dict[str, dict[str, Callable[..., None]]] = {
    "Use a model": {
        "chat": chat, "generate": generate, "describe": describe, "classify": classify,
        "download": download, "list": list_models,
    },
    "Train": {"train": train, "train-tokenizer": train_tokenizer},
    "Inspect a model": {
        "walkthrough": walkthrough, "show": show, "validate": validate, "tokenize": tokenize,
        "next": next_tokens, "perplexity": perplexity, "bench": bench,
    },
}  # fmt: skip
# Names that other programs have for what our verbs do.
INSTEAD = {
    "run": "chat", "ask": "chat", "repl": "chat", "complete": "generate", "sample": "generate",
    "pull": "download", "fetch": "download", "get": "download", "ls": "list", "models": "list",
    "search": "list", "rm": "list: it shows where models are", "info": "show", "inspect": "show",
    "check": "validate", "verify": "validate", "benchmark": "bench", "llama-bench": "bench",
    "eval": "perplexity", "ppl": "perplexity", "encode": "tokenize", "decode": "tokenize",
    "logits": "next", "predict": "next", "explain": "walkthrough", "trace": "walkthrough",
    "pretrain": "train", "resume": "train PRESET --resume auto", "lora": "train --init-from MODEL",
    "finetune": "train --init-from MODEL", "fine-tune": "train --init-from MODEL",
    "quantize": "generate --quantize q8_0", "help": "--help", "version": "--version",
}  # fmt: skip
UsageError: Any = typer.BadParameter.__base__
LONG_WORD = re.compile(rf"\S{{{QUOTED_CHARACTERS + 1},}}")
MAX_USAGE_ERROR = 400  # characters
COMPLETION = "_GLASSLLAMA_COMPLETE"  # set by shells


class Verbs(TyperGroup):
    """The application: errors in usage are one line; all others are left to `exit_code_of`."""

    def main(self, *args: Any, **options: Any) -> Any:
        if COMPLETION in os.environ:
            return super().main(*args, **options)
        try:
            words = list(args[0]) if args else sys.argv[1:]
            if not words or {"-h", "--help"} & set(words):
                import_help_pages()
            with self.make_context("glassllama", words) as context, compile_notice():
                self.invoke(context)
        except UsageError as error:
            print_error(usage_message(error))
            sys.exit(WRONG_USAGE)
        except typer.Exit as end:
            sys.exit(end.exit_code)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if (verb := INSTEAD.get(args[0])) is not None:
            raise UsageError(f"no such command: {args[0]}; use 'glassllama {verb}'", ctx)
        return super().resolve_command(ctx, args)


def import_help_pages() -> None:
    """Import Typer's help pages without the parts of rich that only its other features need.

    They are Markdown, tracebacks and the printing of attrs classes: a third of the time that
    `--help` takes.
    """
    unused = {"attr", "rich.markdown", "rich.traceback"}
    if {*unused, "typer.rich_utils"} & set(sys.modules):
        return
    part: Any = ModuleType("unused")
    part.Markdown = part.Traceback = object
    sys.modules |= dict.fromkeys(unused, part)
    try:
        import typer.rich_utils  # noqa: F401
    finally:
        for name in unused:
            del sys.modules[name]


def usage_message(error: Any) -> str:
    """The parser's message as one line of limited length, and the command that shows help."""
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    message = LONG_WORD.sub(lambda word: word[0][: QUOTED_CHARACTERS - 1] + "…", message)
    text = shorten(message, MAX_USAGE_ERROR, placeholder=" …")
    command = "glassllama" if error.ctx is None else error.ctx.command_path
    return f"{text[:1].lower()}{text[1:]} (see '{command} -h')"


app = typer.Typer(
    cls=Verbs,
    help="Llama models on your own machine, in readable Python.",
    epilog="Start with: glassllama chat",
    invoke_without_command=True,  # prints the help page
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(given: bool) -> None:
    if given:
        print(f"glassllama {__version__}")
        raise typer.Exit


@app.callback()
def glassllama(
    ctx: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=print_version, is_eager=True,
        help="Print the version and exit.",
    ),
    debug: bool = typer.Option(
        False, "--debug", help="Show the traceback of unexpected errors."
    ),
) -> None:  # fmt: skip
    """Options before the verb. Without a verb, the help page."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


for panel, verbs in VERBS.items():
    for name, verb in verbs.items():
        paragraphs = inspect.cleandoc(verb.__doc__ or "").split("\n\n")
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        command = app.command(name, help=text, rich_help_panel=panel)
        command(with_fields_as_options(verb))
