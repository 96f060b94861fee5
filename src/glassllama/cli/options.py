"""Options that several verbs share, each declared once.

Groups of options are frozen dataclasses. A verb takes such a dataclass as one parameter;
`with_fields_as_options` shows its fields to Typer as separate options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.models import ParameterInfo

from glassllama.base.errors import GenerationError, GlassError, quoted
from glassllama.cli.console import note, progress_bars

if TYPE_CHECKING:
    from glassllama.base.interfaces import Tokenizer
    from glassllama.llm import LLM, Options

DEFAULT_MODEL = "smollm2-135m"
MAX_SHOWN_SPECIALS = 3  # control tokens that a note lists


def model_names(incomplete: str) -> Iterator[str]:
    """Shell completion of short names (the shell itself adds files)."""
    from glassllama.hub import SHORT_NAMES

    return (name for name in SHORT_NAMES if name.startswith(incomplete))


NAMES = (
    "A path, a short name (see 'glassllama list'), or a Hub id "
    r"org/name\[@revision]\[:FILE.gguf]."
)
model_option = partial(typer.Option, rich_help_panel="Model")
sampling_option = partial(typer.Option, rich_help_panel="Sampling")

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help=NAMES, autocompletion=model_names)
]
Offline = Annotated[bool, model_option("--offline", help="Never use the network.")]
PreferPth = Annotated[
    bool,
    model_option(
        "--pth", help="From a Hub repository that has both: Meta's .pth files, not safetensors."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead.")]
Specials = Annotated[
    bool,
    typer.Option(
        "--specials",
        help="Read control tokens in the text, such as <|im_start|>, as control tokens.",
    ),
]
Logprobs = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="With --json: log probabilities of each token and of the N most likely ones.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and where it may come from."""

    model: Annotated[
        str,
        model_option("--model", "-m", metavar="MODEL", help=NAMES, autocompletion=model_names),
    ] = DEFAULT_MODEL
    offline: Offline = False
    pth: PreferPth = False

    def path(self) -> Path:
        """The model's file or folder; downloaded first if necessary."""
        return find(self.model, offline=self.offline, pth=self.pth)


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """How the model is run: the keyword arguments of `glassllama.load`."""

    backend: Annotated[
        Literal["auto", "engine", "torch"],
        model_option(
            metavar="NAME",
            help="engine: compiled for this CPU, quantized weights stay quantized. torch: the "
            "reference in PyTorch. auto: engine on a CPU, else torch.",
        ),
    ] = "auto"
    device: Annotated[
        str, model_option(metavar="NAME", help="cpu, cuda, cuda:1, mps …: all but cpu need torch.")
    ] = "cpu"
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        model_option(metavar="NAME", help="float32 or bfloat16, for the torch backend."),
    ] = None
    exact: Annotated[
        bool,
        model_option("--exact", help="Dequantize weights and compute in float32: slow, exact."),
    ] = False
    quantize: Annotated[
        Literal["none", "q8_0", "q4_0"] | None,
        model_option(
            metavar="TYPE",
            help="How the engine quantizes float weights: q8_0 (half of bfloat16), q4_0 (a third) "
            "or none.",
            show_default="none, unless memory is short",
        ),
    ] = None
    cache_type: Annotated[
        Literal["int16", "int8"],
        model_option(
            metavar="TYPE", help="KV cache of the engine: int16, or int8 for half the memory."
        ),
    ] = "int16"
    threads: Annotated[
        int | None,
        model_option(min=1, metavar="N", help="CPU threads.", show_default="all cores"),
    ] = None
    stream_layers: Annotated[
        bool,
        model_option(
            "--stream-layers",
            help="Read one layer at a time, for every token again: little memory, slow.",
        ),
    ] = False

    def load(self, options: ModelOptions) -> LLM:
        """Load the model, with progress bars and its notes."""
        from glassllama.llm import load

        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        with progress_bars() as bar:
            llm = load(
                options.model,
                **{"cache" if name == "cache_type" else name: v for name, v in values.items()},
                offline=options.offline,
                prefer_pth=options.pth,
                download_progress=bar(f"downloading {options.model}", "bytes"),
                load_progress=bar(f"loading {options.model}", "tensors"),
            )
        with suppress(GlassError):
            _ = llm.tokenizer  # reading it may add notes
        for line in llm.notes:
            note(f"note: {line}")
        return llm


def find(name: str, *, offline: bool = False, pth: bool = False) -> Path:
    """The model's file or folder; downloaded first if necessary, with a progress bar."""
    from glassllama import hub

    with progress_bars() as bar:
        progress = bar(f"downloading {name}", "bytes")
        return hub.resolve(name, offline=offline, prefer_pth=pth, progress=progress)


MaxTokens = Annotated[
    int | None,
    sampling_option(
        "--max-tokens",
        "-n",
        metavar="N",
        help="Stop after N tokens. Else at the model's end token or a full context.",
    ),
]
RepetitionPenalty = Annotated[
    float,
    sampling_option(
        metavar="X", help="Above 1: tokens of the prompt and the answer become less likely."
    ),
]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen and when to stop: `glassllama.llm.Options`, which checks them.

    Temperature and top-p are those of Meta's example programs for Llama 3.
    """

    max_tokens: MaxTokens = None
    temperature: Annotated[
        float,
        sampling_option(
            "--temperature", "-t", metavar="T", help="0: always the most likely token (greedy)."
        ),
    ] = 0.6
    top_k: Annotated[
        int | None, sampling_option(metavar="K", help="Sample from the K most likely tokens.")
    ] = None
    top_p: Annotated[
        float,
        sampling_option(
            metavar="P", help="Sample from the most likely tokens with a total probability of P."
        ),
    ] = 0.9
    min_p: Annotated[
        float,
        sampling_option(
            metavar="P", help="Exclude tokens less than P times as likely as the most likely one."
        ),
    ] = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: Annotated[
        float,
        sampling_option(
            metavar="X", help="Above 0: tokens that are in the answer become less likely."
        ),
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        sampling_option(
            metavar="X", help="Above 0: tokens become less likely with every use in the answer."
        ),
    ] = 0.0
    seed: Annotated[
        int | None,
        sampling_option(
            metavar="N",
            help="The same seed gives the same answer.",
            show_default="a new one every time",
        ),
    ] = None
    stop: Annotated[
        list[str] | None,
        sampling_option(metavar="TEXT", help="End the answer before TEXT. Repeatable."),
    ] = None
    ignore_eos: Annotated[
        bool,
        sampling_option("--ignore-eos", help="Continue after the end token, up to --max-tokens."),
    ] = False
    on_overflow: Annotated[
        Literal["stop", "shift"] | None,
        sampling_option(
            metavar="NAME",
            help="If the context is full. stop: end the answer. shift: drop the older half of the "
            "text and continue.",
            show_default="shift for your own models with a context under 1,024, else stop",
        ),
    ] = None
    no_speculation: Annotated[
        bool,
        sampling_option(
            "--no-speculation", help="Never guess several tokens ahead: slower, same answer."
        ),
    ] = False

    def check(self) -> None:
        """Raise GenerationError for values that generation does not accept."""
        from glassllama.generation import GenerationSettings, make_sampler

        values = {field.name: getattr(self, field.name) for field in fields(self)}
        GenerationSettings(max_tokens=values.pop("max_tokens"))
        for name in ("ignore_eos", "on_overflow", "no_speculation", "stop"):
            values.pop(name)
        make_sampler(**values)

    def options(self, logprobs: int | None = None) -> Options:
        """The options as `LLM.generate` takes them. Raises BadParameter for bad values."""
        try:
            self.check()
        except GenerationError as error:
            name = str(error).split()[0]
            hint = f"--{name.replace('_', '-')}" if hasattr(self, name) else None
            raise typer.BadParameter(str(error), param_hint=hint) from None
        values: Any = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {"logprobs": logprobs, "stop": tuple(self.stop or ())}
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

    max_tokens: MaxTokens = 1024
    repetition_penalty: RepetitionPenalty = 1.1


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
    parameters: list[tuple[str, Any, Any]] = []  # name, annotation, default
    hints = get_type_hints(verb, include_extras=True)
    for name, parameter in inspect.signature(verb).parameters.items():
        group = hints[name]
        if is_dataclass(group):
            groups[name] = group
            kinds = get_type_hints(group, include_extras=True)
            parameters += [
                (field.name, kinds[field.name], field.default) for field in fields(group)
            ]
        else:
            parameters.append((name, group, parameter.default))

    @wraps(verb)
    def call(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        verb(**values)

    shown = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=with_parser(kind)
        )
        for name, kind, default in parameters
    ]
    call.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return call


def with_parser(annotation: Any) -> Any:
    """The annotation of a number or path with `parse_value`: its errors say what was given."""
    if get_origin(annotation) is not Annotated:
        return annotation
    kind, info = get_args(annotation)
    inner = {kind, *get_args(kind)}
    value_type = next((each for each in (int, float, Path) if each in inner), None)
    if value_type is None or not isinstance(info, ParameterInfo):
        return annotation
    least, most = info.min, info.max
    info = copy(info)
    info.min = info.max = None
    info.parser = lambda word: parse_value(value_type, least, most, word)
    return Annotated[kind, info]


def parse_value(kind: Any, least: float | None, most: float | None, word: Any) -> Any:
    """A number between the bounds, or a path. Raises BadParameter."""
    if not isinstance(word, str):
        return word  # a default
    with suppress(ValueError):
        value = kind(word)
        if word and (least is None or value >= least) and (most is None or value <= most):
            return value
    expected = {int: "a whole number", float: "a number"}.get(kind, "the name of a file or folder")
    bounds = [
        *([] if least is None else [f"at least {least:g}"]),
        *([] if most is None else [f"at most {most:g}"]),
    ]
    limits = f" of {' and '.join(bounds)}" if bounds else ""
    raise typer.BadParameter(f"expected {expected}{limits}, got {quoted(word)}")
