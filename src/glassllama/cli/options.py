"""The options that verbs share, each declared once, as a field of a frozen dataclass.

A verb takes such a dataclass as one parameter; `spread` shows its fields to the command line as
options of their own and puts the dataclass together again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from glassllama.base.errors import GenerationError, GlassError
from glassllama.cli.console import note, progress_bars
from glassllama.cli.param_types import read_by_us

if TYPE_CHECKING:
    from glassllama.base.interfaces import Tokenizer
    from glassllama.llm import LLM, Options

DEFAULT_MODEL = "smollm2-135m"
NOT_THE_SAMPLERS = (
    "max_tokens",
    "ignore_eos",
    "on_overflow",
    "speculation",
    "stop",
)  # of SamplingOptions


class Backend(StrEnum):
    auto = "auto"
    engine = "engine"
    torch = "torch"


class CacheType(StrEnum):
    int16 = "int16"
    int8 = "int8"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Overflow(StrEnum):
    stop = "stop"
    shift = "shift"


class Quantise(StrEnum):
    none = "none"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


def model_names(incomplete: str) -> Iterator[str]:
    """What the shell offers for a model: short names; it adds files by itself."""
    from glassllama.hub import SHORT_NAMES

    return (name for name in SHORT_NAMES if name.startswith(incomplete))


NAMES = "A path, a short name (see 'glassllama list'), or a Hub id org/name[@revision][:FILE.gguf]."
model_option = partial(typer.Option, rich_help_panel="Model")
sampling_option = partial(typer.Option, rich_help_panel="Sampling")

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help=NAMES, autocompletion=model_names)
]
Offline = Annotated[bool, model_option("--offline", help="Never use the network.")]
PreferPth = Annotated[
    bool,
    model_option(
        "--pth", help="Where a Hub repository has both, take Meta's .pth files, not safetensors."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead.")]
Specials = Annotated[
    bool,
    typer.Option(
        "--specials",
        help="Read control tokens written in the text, such as <|im_start|>, as control tokens.",
    ),
]
Logprobs = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="With --json: log probabilities of each token, and of the N likeliest in its place.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Which:
    """Which model."""

    model: Annotated[
        str,
        model_option("--model", "-m", metavar="MODEL", help=NAMES, autocompletion=model_names),
    ] = DEFAULT_MODEL
    offline: Offline = False
    pth: PreferPth = False

    def path(self) -> Path:
        """Where it is on this machine, downloaded first if need be, with a bar."""
        return find(self.model, offline=self.offline, pth=self.pth)


@dataclass(frozen=True, kw_only=True)
class How:
    """How it is run."""

    backend: Annotated[
        Backend,
        model_option(
            metavar="NAME",
            help="engine: compiled for this CPU, quantised weights stay quantised. torch: the "
            "reference in PyTorch. auto: the engine on a CPU, torch elsewhere.",
        ),
    ] = Backend.auto
    device: Annotated[
        str, model_option(metavar="NAME", help="cpu, cuda, cuda:1, mps …: all but cpu need torch.")
    ] = "cpu"
    dtype: Annotated[
        Dtype | None,
        model_option(metavar="NAME", help="float32 or bfloat16, for the torch backend."),
    ] = None
    exact: Annotated[
        bool,
        model_option("--exact", help="Unpack the weights and compute in float32: slow, exact."),
    ] = False
    quantize: Annotated[
        Quantise | None,
        model_option(
            metavar="TYPE",
            help="What the engine makes of float weights while loading: q8_0 (half of bfloat16), "
            "q4_0 (a third) or none.",
            show_default="none, unless memory is too short",
        ),
    ] = None
    cache_type: Annotated[
        CacheType,
        model_option(
            metavar="TYPE",
            help="How the engine keeps keys and values: int16, or int8 for half the memory.",
        ),
    ] = CacheType.int16
    threads: Annotated[
        int | None,
        model_option(min=1, metavar="N", help="CPU threads.", show_default="every core"),
    ] = None
    stream_layers: Annotated[
        bool,
        model_option(
            "--stream-layers",
            help="Read one layer at a time, anew for every token: any model, little memory, slow.",
        ),
    ] = False

    def load(self, which: Which) -> LLM:
        """The model, ready to answer, with bars for what takes long and notes of what was odd."""
        from glassllama.llm import load

        with progress_bars() as bar:
            llm = load(
                which.model,
                backend=self.backend.value,
                device=self.device,
                dtype=None if self.dtype is None else self.dtype.value,
                exact=self.exact,
                quantize=None if self.quantize is None else self.quantize.value,
                cache=self.cache_type.value,
                threads=self.threads,
                offline=which.offline,
                prefer_pth=which.pth,
                stream_layers=self.stream_layers,
                download_progress=bar(f"downloading {which.model}", "bytes"),
                load_progress=bar(f"loading {which.model}", "tensors"),
            )
        with suppress(GlassError):
            _ = llm.tokenizer  # whose notes belong to these
        for line in llm.notes:
            note(f"note: {line}")
        return llm


def require_json(json: bool, logprobs: int | None) -> None:
    """--logprobs says nothing where there is no place to print them."""
    if logprobs is not None and not json:
        raise typer.BadParameter("only together with --json", param_hint="--logprobs")


def find(name: str, *, offline: bool = False, pth: bool = False) -> Path:
    """The model's file or folder, downloaded first if need be, with a bar."""
    from glassllama import hub

    with progress_bars() as bar:
        progress = bar(f"downloading {name}", "bytes")
        return hub.resolve(name, offline=offline, prefer_pth=pth, progress=progress)


RepetitionPenalty = Annotated[
    float,
    sampling_option(
        min=0.0,
        metavar="X",
        help="Above 1: tokens of the prompt and the answer become less likely.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen, and when to stop.

    Temperature and top-p are those of the example programs that Meta published with Llama 3.
    """

    max_tokens: Annotated[
        int | None,
        sampling_option(
            "--max-tokens",
            "-n",
            min=1,
            metavar="N",
            help="Stop after N tokens.",
            show_default="at the model's own end, or when its context is full",
        ),
    ] = None
    temperature: Annotated[
        float,
        sampling_option(
            "--temperature",
            "-t",
            min=0.0,
            metavar="T",
            help="0: always the likeliest token; the higher, the more varied.",
        ),
    ] = 0.6
    top_k: Annotated[
        int | None,
        sampling_option(min=1, metavar="K", help="Choose among the K likeliest tokens only."),
    ] = None
    top_p: Annotated[
        float,
        sampling_option(
            min=0.0,
            max=1.0,
            metavar="P",
            help="Choose among the likeliest tokens that reach probability P together.",
        ),
    ] = 0.9
    min_p: Annotated[
        float,
        sampling_option(
            min=0.0,
            max=1.0,
            metavar="P",
            help="Leave out tokens less than P times as likely as the likeliest one.",
        ),
    ] = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: Annotated[
        float,
        sampling_option(
            min=-2.0,
            max=2.0,
            metavar="X",
            help="Above 0: tokens already in the answer become less likely.",
        ),
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        sampling_option(
            min=-2.0,
            max=2.0,
            metavar="X",
            help="Above 0: tokens become less likely with every use in the answer.",
        ),
    ] = 0.0
    seed: Annotated[
        int | None,
        sampling_option(
            min=0,
            metavar="N",
            help="Same seed, same answer.",
            show_default="a new one every time",
        ),
    ] = None
    stop: Annotated[
        list[str] | None,
        sampling_option(
            metavar="TEXT", help="End the answer before TEXT; may be given several times."
        ),
    ] = None
    ignore_eos: Annotated[
        bool,
        sampling_option(
            "--ignore-eos", help="Go on after the model's own end, to --max-tokens: for measuring."
        ),
    ] = False
    on_overflow: Annotated[
        Overflow | None,
        sampling_option(
            metavar="NAME",
            help="Where the context is full before --max-tokens. stop: end the answer. shift: drop "
            "the oldest half of the text and go on.",
            show_default="shift for models of your own with a context under 1,024, else stop",
        ),
    ] = None
    speculation: Annotated[
        bool,
        sampling_option(
            "--speculation/--no-speculation",
            help="Never guess several tokens ahead: slower, the same answer.",
            show_default="guess where it is faster",
        ),
    ] = True

    def check(self) -> None:
        """Raise GenerationError where the sampler cannot work with them."""
        from glassllama.generation.sampler import make_sampler

        names = [field.name for field in fields(self) if field.name not in NOT_THE_SAMPLERS]
        make_sampler(**{name: getattr(self, name) for name in names})

    def options(self, logprobs: int | None = None) -> Options:
        """As the facade takes them (glassllama.llm.Options), after `check`."""
        try:
            self.check()
        except GenerationError as error:
            raise typer.BadParameter(str(error)) from None
        values: Any = {field.name: getattr(self, field.name) for field in fields(self)}
        values["on_overflow"] = None if self.on_overflow is None else self.on_overflow.value
        values["logprobs"] = logprobs
        values["stop"] = tuple(self.stop or ())
        options: Options = values
        return options


@dataclass(frozen=True, kw_only=True)
class ChatOptions(SamplingOptions):
    """The same for a conversation, where an answer that repeats itself must not go on for ever.

    Measured with the default model, temperature 0.6 and top-p 0.9: four of six everyday requests (a
    long story, a poem, "explain … in detail", "list all prime numbers") had no end within 1,024
    tokens, but the same line over and over. With a penalty of 1.1 all four ended, after 64 to 810.
    """

    max_tokens: Annotated[
        int | None,
        sampling_option(
            "--max-tokens", "-n", min=1, metavar="N", help="Stop an answer after N tokens."
        ),
    ] = 1024
    repetition_penalty: RepetitionPenalty = 1.1


def note_specials(tokenizer: Tokenizer, text: str, specials: bool) -> None:
    """Say that control tokens in a text stay text, where nobody asked for anything else."""
    from glassllama.tokenizers.special_tokens import find_tokens

    found = [] if specials else find_tokens(text, tokenizer.specials)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        note(f"the text holds {', '.join(found[:3])}{more}, read as text; --specials reads control "
             "tokens as such")  # fmt: skip


def spread(verb: Callable[..., None]) -> Callable[..., None]:
    """`verb` with every parameter that is a dataclass replaced by that dataclass's fields.

    What is typed is read by cli/param_types.py.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    hints = get_type_hints(verb, include_extras=True)
    for parameter in inspect.signature(verb).parameters.values():
        kind = hints[parameter.name]
        if is_dataclass(kind):
            groups[parameter.name] = kind
            parameters += _fields_as_parameters(kind)
        else:
            parameters.append(
                parameter.replace(annotation=read_by_us(kind), kind=parameter.KEYWORD_ONLY)
            )

    @wraps(verb)
    def taking_all(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        verb(**values)

    taking_all.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    taking_all.__annotations__ = {p.name: p.annotation for p in parameters}
    return taking_all


def _fields_as_parameters(kind: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(f.name, keyword, default=f.default, annotation=read_by_us(hints[f.name]))
        for f in fields(kind)
    ]
