"""The verbs, put together. Each is a short function in a file of its own, and imports late."""

from __future__ import annotations

import re
import sys
from textwrap import shorten
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from glassllama import __version__
from glassllama.base.errors import QUOTED_CHARACTERS
from glassllama.cli.bench import bench
from glassllama.cli.chat import chat
from glassllama.cli.compile_notice import told_of_compiling
from glassllama.cli.download import download
from glassllama.cli.errors import DEBUG, code_of, failed
from glassllama.cli.generate import generate
from glassllama.cli.help import page, parameter_sections
from glassllama.cli.list import list_models
from glassllama.cli.next import next_tokens
from glassllama.cli.options import spread
from glassllama.cli.other_names import no_such_verb
from glassllama.cli.perplexity import perplexity
from glassllama.cli.show import show
from glassllama.cli.tokenize import tokenize
from glassllama.cli.train import train
from glassllama.cli.train_tokenizer import train_tokenizer
from glassllama.cli.validate import validate
from glassllama.cli.walkthrough import walkthrough

NAMES = {list_models: "list", next_tokens: "next", train_tokenizer: "train-tokenizer"}
UsageError: Any = typer.BadParameter.__base__  # the parser's own class, whichever it comes with
WRONG_USAGE = 2  # exit code
LONG_WORD = re.compile(rf"\S{{{QUOTED_CHARACTERS + 1},}}")  # only what was typed has such
LONGEST_FAULT = 400  # characters of a mistake's description: many words may have been typed
USE, MAKE, LOOK = "Use a model", "Make one", "Look at one"


class Verb(TyperCommand):
    """One verb, with a help page of ours."""

    def get_help(self, ctx: Any) -> str:
        return page(self, ctx, parameter_sections(self.get_params(ctx)))


class Verbs(TyperGroup):
    """All verbs. Their faults become lines and exit codes here, before the parser sees them."""

    def main(self, *arguments: Any, **options: Any) -> NoReturn:
        """Run the command line; a mistake in it is one line, as every other error is."""
        try:
            code = super().main(*arguments, **{**options, "standalone_mode": False})
        except UsageError as error:
            failed(usage_fault(error))
            code = WRONG_USAGE
        sys.exit(code or 0)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands and not args[0].startswith("-"):
            raise UsageError(no_such_verb(args[0], self.commands), ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> None:
        with told_of_compiling():
            code = code_of(lambda: super(Verbs, self).invoke(ctx), unexpected=False)
        if code:
            ctx.exit(code)

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Read the command line; --help and --version print here, perhaps to nobody."""
        made: list[Any] = []
        parse = super().make_context
        code = code_of(lambda: made.append(parse(*arguments, **options)), unexpected=False)
        if not made:
            sys.exit(code)
        return made[0]

    def get_help(self, ctx: Any) -> str:
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, verb in self.commands.items():
            brief = (verb.help or "").strip().split("\n\n")[0]
            panel = str(getattr(verb, "rich_help_panel", ""))
            panels.setdefault(panel, []).append((name, " ".join(brief.split())))
        return page(self, ctx, [*panels.items(), *parameter_sections(self.get_params(ctx))])


def usage_fault(error: Any) -> str:
    """The parser's complaint, as it is worded everywhere here, and where to read more."""
    message = LONG_WORD.sub(
        lambda word: word[0][: QUOTED_CHARACTERS - 1] + "…", error.format_message()
    )
    text = shorten(message, LONGEST_FAULT, placeholder=" …").rstrip(".")
    asked = "glassllama" if error.ctx is None else error.ctx.command_path
    return f"{text[:1].lower()}{text[1:]} (see '{asked} -h')"


app = typer.Typer(
    cls=Verbs,
    help="Llama models on your own machine, in Python you can see through.",
    epilog="Start with: glassllama chat",
    invoke_without_command=True,  # then this is the help page
    pretty_exceptions_enable=False,  # __main__ prints one line for what nobody foresaw
    rich_markup_mode=None,  # cli/help.py writes the pages
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"glassllama {__version__}")
        raise typer.Exit


@app.callback()
def glassllama(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show where in the program an unexpected error happened.")
    ] = False,
) -> None:
    """Options before the verb. Without a verb, the help page."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


for verb, panel in (
    (chat, USE),
    (generate, USE),
    (download, USE),
    (list_models, USE),
    (train, MAKE),
    (train_tokenizer, MAKE),
    (walkthrough, LOOK),
    (show, LOOK),
    (validate, LOOK),
    (tokenize, LOOK),
    (next_tokens, LOOK),
    (perplexity, LOOK),
    (bench, LOOK),
):
    name = NAMES.get(verb, verb.__name__)
    app.command(name, cls=Verb, rich_help_panel=panel)(spread(verb))
