"""Options that several verbs share, each declared once, in Typer's style: `name: type = info`.

Groups of options are frozen dataclasses. A verb takes such a dataclass as one parameter;
`with_fields_as_options` shows its fields to Typer as separate options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args, get_type_hints

import typer
from typer.models import ParameterInfo

from glassllama.base.errors import GenerationError, GlassError, quoted
from glassllama.cli.console import note, progress_bars

if TYPE_CHECKING:
    from glassllama.base.interfaces import Tokenizer
    from glassllama.llm import LLM, Options

DEFAULT_MODEL = "smollm2-135m"
THINKING_TOKENS = 8192  # limit of an answer in `chat`, with the reasoning before it
MAX_SHOWN_SPECIALS = 3  # control tokens that a note lists


def model_names(incomplete: str) -> Iterator[str]:
    """Shell completion of short names (the shell itself adds files)."""
    from glassllama.hub import SHORT_NAMES

    return (name for name in SHORT_NAMES if name.startswith(incomplete))


def shared(info: Any) -> Any:
    """A field of a group of options, from its default and names as Typer takes them."""
    return field(default=info.default, metadata={"info": info})


def option(*default_and_names: Any, **details: Any) -> Any:
    return shared(typer.Option(*default_and_names, **details))


model_option = partial(option, rich_help_panel="Model")
sampling = partial(option, rich_help_panel="Sampling")

NAMES: dict[str, Any] = {
    "metavar": "MODEL",
    "help": "A path, a short name (see 'glassllama list'), or a Hub id "
    r"org/name\[@revision]\[:FILE.gguf].",
    "autocompletion": model_names,
}
MODEL: Any = typer.Argument(..., **NAMES)
OFFLINE: Any = typer.Option(
    False, "--offline", rich_help_panel="Model", help="Never use the network."
)
PTH: Any = typer.Option(
    False, "--pth", rich_help_panel="Model",
    help="From a Hub repository that has both: Meta's .pth files, not safetensors.",
)  # fmt: skip
JSON: Any = typer.Option(False, "--json", help="Print one line of JSON instead.")
SPECIALS: Any = typer.Option(
    False, "--specials",
    help="Read control tokens in the text, such as <|im_start|>, as control tokens.",
)  # fmt: skip
LOGPROBS: Any = typer.Option(
    None, min=0, metavar="N",
    help="With --json: log probabilities of each token and of the N most likely ones.",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and where it may come from."""

    model: str = model_option(DEFAULT_MODEL, "--model", "-m", **NAMES)
    offline: bool = shared(OFFLINE)
    pth: bool = shared(PTH)

    def path(self) -> Path:
        """The model's file or folder; downloaded first if necessary."""
        return find(self.model, self.offline, self.pth)


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """How the model is run: the keyword arguments of `glassllama.load`."""

    backend: Literal["auto", "engine", "torch"] = model_option(
        "auto", metavar="NAME",
        help="engine: compiled for this CPU, quantized weights stay quantized. torch: the "
        "reference in PyTorch. auto: engine on a CPU, else torch.",
    )  # fmt: skip
    device: str = model_option(
        "cpu", metavar="NAME", help="cpu, cuda, cuda:1, mps …: all but cpu need torch."
    )
    dtype: Literal["float32", "bfloat16"] | None = model_option(
        None, metavar="NAME", help="float32 or bfloat16, for the torch backend."
    )
    exact: bool = model_option(
        False, "--exact", help="Dequantize weights and compute in float32: slow, exact."
    )
    quantize: Literal["none", "q8_0", "q4_0"] | None = model_option(
        None, metavar="TYPE", show_default="none, unless memory is short",
        help="How the engine quantizes float weights: q8_0 (half of bfloat16), q4_0 (a third) or "
        "none.",
    )  # fmt: skip
    cache_type: Literal["int16", "int8"] = model_option(
        "int16", metavar="TYPE", help="KV cache of the engine: int16, or int8 for half the memory."
    )
    threads: int | None = model_option(
        None, min=1, metavar="N", help="CPU threads.", show_default="all cores"
    )
    stream_layers: bool = model_option(
        False, "--stream-layers",
        help="Read one layer at a time, for every token again: little memory, slow.",
    )  # fmt: skip

    context_size: int | None = model_option(
        None, min=1, metavar="N", show_default="the model's usual one",
        help="Tokens of the context, up to the model's longest one.",
    )  # fmt: skip

    def load(self, options: ModelOptions) -> LLM:
        """Load the model, with progress bars and its notes."""
        from glassllama.llm import load

        show_terms(options.model)
        values: dict[str, Any] = values_of(self)
        with progress_bars() as bar:
            llm = load(
                options.model, cache=values.pop("cache_type"), **values,
                offline=options.offline, prefer_pth=options.pth,
                download_progress=bar(f"downloading {options.model}", "bytes"),
                load_progress=bar(f"loading {options.model}", "tensors"),
            )  # fmt: skip
        with suppress(GlassError):
            _ = llm.tokenizer, llm.sampling_defaults  # reading them may add notes
        for line in llm.notes:
            note(f"note: {line}")
        return llm


def values_of(group: Any) -> dict[str, Any]:
    """The fields of a dataclass, by name."""
    return {each.name: getattr(group, each.name) for each in fields(group)}


def show_terms(name: str) -> None:
    """Print the terms of use of a model that will be downloaded, if its license has any."""
    from glassllama.hub import terms_before_download

    if (terms := terms_before_download(name)) is not None:
        note(f"{name}: {terms}")


def find(name: str, offline: bool = False, pth: bool = False) -> Path:
    """The model's file or folder; downloaded first if necessary, with a progress bar."""
    from glassllama import hub

    show_terms(name)
    with progress_bars() as bar:
        progress = bar(f"downloading {name}", "bytes")
        return hub.resolve(name, offline=offline, prefer_pth=pth, progress=progress)


max_tokens_option = partial(
    sampling, metavar="N",
    help="Stop after N tokens. Else at the model's end token or a full context.",
)  # fmt: skip
repetition_option = partial(
    sampling, metavar="X",
    help="Above 1: tokens of the prompt and the answer become less likely.",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen and when to stop: `glassllama.llm.Options`, which checks them.

    None of the first six options: `with_defaults` takes the value from the model's files, else from
    `own_defaults`. Their temperature and top-p are those of Meta's example programs for Llama 3.
    """

    own_defaults: ClassVar[dict[str, float]] = {
        "temperature": 0.6, "top_p": 0.9, "min_p": 0.0, "repetition_penalty": 1.0,
    }  # fmt: skip
    max_tokens: int | None = max_tokens_option(None, "--max-tokens", "-n")
    temperature: float = sampling(
        None, "--temperature", "-t", metavar="T", show_default="the model's, else 0.6",
        help="0: always the most likely token (greedy).",
    )  # fmt: skip
    top_k: int | None = sampling(
        None, metavar="K", show_default="the model's, else 0",
        help="Sample from the K most likely tokens; 0: from all.",
    )  # fmt: skip
    top_p: float = sampling(
        None, metavar="P", show_default="the model's, else 0.9",
        help="Sample from the most likely tokens with a total probability of P.",
    )  # fmt: skip
    min_p: float = sampling(
        None, metavar="P", show_default="the model's, else 0",
        help="Exclude tokens less than P times as likely as the most likely one.",
    )  # fmt: skip
    repetition_penalty: float = repetition_option(None, show_default="the model's, else 1")
    presence_penalty: float = sampling(
        0.0, metavar="X", help="Above 0: tokens that are in the answer become less likely."
    )
    frequency_penalty: float = sampling(
        0.0, metavar="X", help="Above 0: tokens become less likely with every use in the answer."
    )
    seed: int | None = sampling(
        None, metavar="N", help="The same seed gives the same answer.",
        show_default="a new one every time",
    )  # fmt: skip
    stop: list[str] | None = sampling(
        None, metavar="TEXT", help="End the answer before TEXT. Repeatable."
    )
    ignore_eos: bool = sampling(
        False, "--ignore-eos", help="Continue after the end token, up to --max-tokens."
    )
    on_overflow: Literal["stop", "shift"] | None = sampling(
        None, metavar="NAME",
        show_default="shift for your own models with a context under 1,024, else stop",
        help="If the context is full. stop: end the answer. shift: drop the older half of the "
        "text and continue.",
    )  # fmt: skip
    no_speculation: bool = sampling(
        False, "--no-speculation", help="Never guess several tokens ahead: slower, same answer."
    )

    def with_defaults(self, of_model: Mapping[str, float | None]) -> Self:
        """These options, and what they leave open: from the model, else from `own_defaults`."""
        defaults: dict[str, Any] = {**self.own_defaults, **of_model}
        return replace(self, **{k: v for k, v in defaults.items() if getattr(self, k) is None})

    def check(self) -> None:
        """Raise GenerationError for values that generation does not accept."""
        from glassllama.generation import GenerationSettings, make_sampler

        values = values_of(self)
        GenerationSettings(max_tokens=values.pop("max_tokens"))
        for name in ("ignore_eos", "on_overflow", "no_speculation", "stop"):
            values.pop(name)
        values["top_k"] = self.top_k or None
        make_sampler(**{name: value for name, value in values.items() if value is not None})

    def options(self, logprobs: int | None = None) -> Options:
        """The options as `LLM.generate` takes them. Raises BadParameter for bad values."""
        try:
            self.check()
        except GenerationError as error:
            name = str(error).split()[0]
            hint = f"--{name.replace('_', '-')}" if hasattr(self, name) else None
            raise typer.BadParameter(str(error), param_hint=hint) from None
        values: Any = values_of(self) | {"logprobs": logprobs, "stop": tuple(self.stop or ())}
        values["top_k"] = self.top_k or None
        values["speculation"] = not values.pop("no_speculation")
        options: Options = values
        return options


@dataclass(frozen=True, kw_only=True)
class ChatOptions(SamplingOptions):
    """Defaults for conversations: answers that repeat themselves have to end.

    Measured with the default model, temperature 0.6 and top-p 0.9: four of six everyday requests (a
    long story, a poem, "explain … in detail", "list all prime numbers") did not end within 1,024
    tokens and repeated one line. With a penalty of 1.1 all four ended, after 64 to 810 tokens.
    """

    own_defaults: ClassVar = SamplingOptions.own_defaults | {
        "repetition_penalty": 1.1, "max_tokens": 1024,
    }  # fmt: skip
    max_tokens: int | None = max_tokens_option(
        None,
        "--max-tokens",
        "-n",
        show_default=f"1024; {THINKING_TOKENS} if the model thinks first",
    )
    repetition_penalty: float = repetition_option(None, show_default="the model's, else 1.1")


def require_json(json: bool, logprobs: int | None) -> None:
    """--logprobs needs --json."""
    if logprobs is not None and not json:
        raise typer.BadParameter("only together with --json", param_hint="--logprobs")


def note_specials(tokenizer: Tokenizer, text: str, specials: bool) -> None:
    """A note if the text contains control tokens that are read as text."""
    from glassllama.tokenizers.vocabulary import find_tokens

    found = [] if specials else find_tokens(text, tokenizer.specials)
    if found:
        more = len(found) - MAX_SHOWN_SPECIALS
        shown = ", ".join(found[:MAX_SHOWN_SPECIALS]) + (f" and {more} more" if more > 0 else "")
        note(f"{shown} in the text: read as text; --specials reads control tokens as such")


# --- dataclasses as options -----------------------------------------------------------------------


def with_fields_as_options(verb: Callable[..., None]) -> Callable[..., None]:
    """`verb` with every dataclass parameter replaced by the fields of that dataclass."""
    groups: dict[str, Any] = {}
    shown: list[tuple[str, Any, Any]] = []  # name, type, ParameterInfo
    hints = get_type_hints(verb)
    for name, parameter in inspect.signature(verb).parameters.items():
        if is_dataclass(group := hints[name]):
            groups[name] = group
            kinds = get_type_hints(group)
            shown += [(f.name, kinds[f.name], f.metadata["info"]) for f in fields(group)]
        else:
            shown.append((name, group, parameter.default))

    @wraps(verb)
    def call(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{each.name: values.pop(each.name) for each in fields(group)})
        verb(**values)

    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=with_parser(kind, info))
            for name, kind, info in shown
        ]
    )
    call.__annotations__ = {name: kind for name, kind, _ in shown}
    return call


def with_parser(kind: Any, info: ParameterInfo) -> ParameterInfo:
    """The option of a number or path, with `parse_value`: its errors say what was given."""
    value_type = next(
        (each for each in (int, float, Path) if each in {kind, *get_args(kind)}), None
    )
    if value_type is not None:
        info = copy(info)
        info.parser, info.min = partial(parse_value, value_type, info.min), None
    return info


def parse_value(kind: Any, least: float | None, word: Any) -> Any:
    """A number of at least `least`, or a path. Raises BadParameter."""
    if not isinstance(word, str):
        return word  # a default
    with suppress(ValueError):
        value = kind(word)
        if word and (least is None or value >= least):
            return value
    expected = {int: "a whole number", float: "a number"}.get(kind, "the name of a file or folder")
    limit = "" if least is None else f" of at least {least:g}"
    raise typer.BadParameter(f"expected {expected}{limit}, got {quoted(word)}")
