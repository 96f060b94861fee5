"""The facade: a name → a model that answers. Text and ids meet here.

from glassllama import load
llm = load("smollm2-135m")
print(llm.chat("Why is the sky blue?").text)
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from glassllama import hub
from glassllama.base.errors import GenerationError, MissingExtraError, named, quoted
from glassllama.base.interfaces import (
    CacheType,
    Executor,
    Progress,
    Tokenizer,
    checked_ids,
    logits_of_text,
)
from glassllama.generation import (
    FinishReason,
    Generation,
    GenerationSettings,
    Overflow,
    Request,
    Scheduler,
    Timings,
    TokenEvent,
    TokenLogprob,
    make_sampler,
)
from glassllama.pictures import (
    ImagePrompt,
    ImageReader,
    ImageTextModel,
    as_parts,
    is_siglip,
    question_about,
    split_pictures,
)
from glassllama.tokenizers.chars import CharTokenizer
from glassllama.tokenizers.chat import ChatFormat, Message, choose_chat_format
from glassllama.tokenizers.detokenizer import Detokenizer, StopStrings
from glassllama.tokenizers.reasoning import Piece, ReasoningSplitter
from glassllama.tokenizers.vocabulary import find_tokens, prompt_ids
from glassllama.vision.images import ImageSource
from glassllama.weights.backend import (
    Backend,
    Dtype,
    Quantize,
    check_numbers,
    check_precision,
    choose_backend,
)
from glassllama.weights.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from glassllama.models.language_model import LanguageModel
    from glassllama.walkthrough import Intervention, Trace

DEFAULT_MODEL = "smollm2-135m"
Prompt = str | Sequence[int] | ImagePrompt
Messages = str | Sequence[Message | Mapping[str, Any]]  # a str is one message of the user


class Options(TypedDict, total=False):
    """How to generate; every key is optional.

    Defaults of temperature, top_k, top_p, min_p and repetition_penalty are what the model's files
    recommend (`LLM.sampling_defaults`). Where they recommend nothing, greedy is the default.
    """

    max_tokens: int | None  # None: until the model stops or the context is full
    temperature: float  # 0: always the likeliest token
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    stop: Sequence[str]  # texts that end the answer and are not part of it; not in reasoning
    logprobs: int | None  # None: none; n: of the chosen token and of the n likeliest
    ignore_eos: bool  # go on after the model's own end: for measuring
    context: int | None  # fewer tokens than the model could hold
    on_overflow: Overflow | None  # at the context's end, before max_tokens; see default_overflow
    specials: bool  # control tokens written in a prompt are read as such, not as text
    speculation: bool  # False: never several tokens in one step; the answer is the same


class TemplateOptions(TypedDict, total=False):
    """Variables of the chat template; one that it does not read is an error."""

    tools: Sequence[Mapping[str, Any]] | None  # JSON schemas of functions
    enable_thinking: bool | None  # whether to write reasoning; None: as the template does it
    template_options: Mapping[str, Any] | None  # others, by name


class ChatOptions(Options, TemplateOptions, total=False):
    """How to answer a conversation."""


LOOP_OPTIONS = (
    "max_tokens", "ignore_eos", "logprobs", "context", "on_overflow", "speculation"
)  # fmt: skip
RUN_FILE = "settings.toml"  # what every run of 'glassllama train' has
# Of a longer text only so much is encoded before it is known to have more ids than the context:
# English has some four characters in a token, code three.
LONG_PROMPT, CHARACTERS_PER_TOKEN = 2**16, 16
SMALL_CONTEXT = 1024  # tokens: models of one's own below it go on past their context by default
MOST_UNKNOWN = 12  # names of options that one message spells out
OPTIONS = frozenset(Options.__annotations__)


@dataclass(frozen=True)
class StepLogprobs:
    """One generated token's natural logarithm of probability, and the likeliest instead of it."""

    id: int
    logprob: float
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came of a prompt. `ids` holds the stop id too, `text` neither it nor a stop string.

    Of a model that thinks before it answers, a chat's `text` is the answer alone.
    """

    text: str
    reasoning_content: str | None = None
    reasoning_tokens: int = 0  # of ids
    ids: list[int]
    prompt_ids: list[int]
    finish_reason: FinishReason
    dropped_tokens: int = 0  # the oldest ones, that the model no longer saw at the end
    logprobs: list[StepLogprobs] | None
    timings: Timings  # of the whole batch


@dataclass
class RowState:
    """One row on its way from ids to text."""

    prompt_ids: list[int]
    decoder: Detokenizer
    stops: StopStrings
    splitter: ReasoningSplitter | None = None
    ids: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    reasoning_tokens: int = 0
    logprobs: list[StepLogprobs] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    dropped_tokens: int = 0

    def add(self, event: TokenEvent) -> list[Piece]:
        """Take in one id -> the text that has become certain."""
        self.ids.append(event.id)
        self.dropped_tokens = event.dropped_tokens
        if event.logprob is not None:
            self.logprobs.append(StepLogprobs(event.id, event.logprob, event.top))
        ended = event.finish_reason
        text = "" if ended == "stop" else self.decoder.push(event.id)
        if ended is not None:
            self.finish_reason = ended
            text += self.decoder.finish()
        new: list[Piece] = []
        for kind, part in self._split(text, ended is not None):
            shown = part if kind == "reasoning_content" else self.stops.push(part)
            new += [Piece(kind, shown)] if shown else []
        if ended is not None and (rest := self.stops.finish()):
            new.append(Piece("content", rest))
        if self.stops.matched is not None:
            self.finish_reason = "stop"
        self.pieces += new
        return new

    def _split(self, text: str, last: bool) -> list[Piece]:
        """The text as pieces of reasoning and answer; counts ids that belong to the reasoning."""
        if self.splitter is None:
            return [Piece("content", text)]
        self.reasoning_tokens += self.splitter.in_reasoning
        return self.splitter.push(text, last)

    def completion(self, timings: Timings, with_logprobs: bool) -> Completion:
        return Completion(
            text="".join(text for kind, text in self.pieces if kind == "content"),
            reasoning_content="".join(t for k, t in self.pieces if k != "content") or None,
            reasoning_tokens=self.reasoning_tokens,
            ids=self.ids,
            prompt_ids=self.prompt_ids,
            finish_reason=self.finish_reason,
            dropped_tokens=self.dropped_tokens,
            logprobs=self.logprobs if with_logprobs else None,
            timings=timings,
        )


class BatchStream(Iterator[tuple[int, str]]):
    """New text as it is generated, with the row of its prompt; `completions` holds all so far."""

    def __init__(
        self, generation: Generation, answers: Sequence[RowState], with_logprobs: bool
    ) -> None:
        self._generation, self._answers = generation, answers
        self._with_logprobs = with_logprobs

    def __next__(self) -> tuple[int, str]:
        row, pieces = self.next_pieces()
        return row, "".join(text for kind, text in pieces if kind == "content")

    def next_pieces(self) -> tuple[int, list[Piece]]:
        """The row of the next token, and the pieces that are certain with it."""
        for row, answer in enumerate(self._answers):
            if answer.stops.matched is not None:
                self.cancel(row)
        event = next(self._generation)
        return event.row, self._answers[event.row].add(event)

    def cancel(self, row: int) -> None:
        """End one row: what was generated so far is its answer."""
        self._generation.cancel(row)

    def close(self) -> None:
        """End all rows."""
        self._generation.close()

    @property
    def completions(self) -> list[Completion]:
        timings = self._generation.timings
        return [answer.completion(timings, self._with_logprobs) for answer in self._answers]


class TextStream(Iterator[str]):
    """New text of the answer as it is generated; `completion` holds all so far.

    While a model thinks, the text is empty; `pieces` has the reasoning, too.
    """

    def __init__(self, batch: BatchStream) -> None:
        self._batch = batch

    def __next__(self) -> str:
        return next(self._batch)[1]

    def pieces(self) -> Iterator[Piece]:
        """New text with its kind: "reasoning_content" or "content"."""
        with suppress(StopIteration):
            while True:
                yield from self._batch.next_pieces()[1]

    def close(self) -> None:
        """End here: what was generated so far is the answer."""
        self._batch.close()

    @property
    def completion(self) -> Completion:
        return self._batch.completions[0]


@dataclass(frozen=True, kw_only=True)
class LLM:
    """A loaded model with its tokenizer. Holds no conversation: every call is on its own.

    All requests share one scheduler, so that those of several threads are computed together. The
    engine's keys and values of the latest chat stay in memory until the next one has ended, so that
    a conversation's next turn reads only what is new; answers are the same to the bit. `close()`
    ends the engine's threads; so does leaving a `with` block.
    """

    name: str
    checkpoint: Checkpoint
    executor: Executor
    backend: Literal["engine", "torch"]
    load_seconds: float
    notes: list[str]

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine's threads and close the files. Further calls raise GenerationError."""
        self.executor.close()
        self.checkpoint.close()

    @cached_property
    def scheduler(self) -> Scheduler:
        """What runs this model's requests."""
        return Scheduler(self.executor)

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def tokenizer(self) -> Tokenizer:
        return self.checkpoint.tokenizer

    @cached_property
    def chat_format(self) -> ChatFormat:
        """How this model was taught to converse. Raises TokenizerError if it was not."""
        tokens = self.checkpoint.template_tokens
        return choose_chat_format(self.checkpoint.chat_template, self.tokenizer, **tokens)

    @property
    def sampling_defaults(self) -> Mapping[str, float | None]:
        """Options that the model's files recommend, or none. Raises ConfigError: a bad value."""
        return self.checkpoint.sampling_defaults.values

    @property
    def default_overflow(self) -> Overflow:
        """`on_overflow` where it is None: "shift" for small models of one's own, else "stop".

        One's own is what 'glassllama train' wrote, or a model of characters; small is a context
        under 1,024 tokens. Others were not trained on texts without a beginning.
        """
        folder = self.checkpoint.folder  # RUN, or RUN/checkpoints/step-N
        run = any((each / RUN_FILE).is_file() for each in (folder, folder.parent.parent))
        own = run or isinstance(self.tokenizer, CharTokenizer)
        return "shift" if own and self.executor.config.max_seq_len < SMALL_CONTEXT else "stop"

    def encode(self, prompt: Prompt, *, specials: bool = False) -> list[int]:
        """Text -> ids with the model's own beginning; ids stay as they are.

        With `specials`, control tokens written in the text are read as such; a begin-of-text token
        is then not doubled. Raises GenerationError for an empty text, where the model begins with
        no token of its own.
        """
        if isinstance(prompt, ImagePrompt):
            return prompt.ids
        if not isinstance(prompt, str):
            return as_list("a prompt", prompt, "a text or a list of ids")
        self._refuse_early(prompt, specials)
        ids = prompt_ids(self.tokenizer, prompt, specials)
        if not ids:
            raise GenerationError(
                "the text is empty, and this model has no begin-of-text token to go on from: "
                "give it at least one character"
            )
        return ids

    def _refuse_early(self, prompt: str, specials: bool) -> None:
        """GenerationError for a text whose beginning has more tokens than the context holds."""
        context = self.executor.config.max_seq_len
        if self.executor.config.unbounded:
            return
        part = prompt[: max(LONG_PROMPT, CHARACTERS_PER_TOKEN * context)]
        if (
            len(part) < len(prompt)
            and len(self.tokenizer.encode(part, specials=specials)) > context
        ):
            raise GenerationError(
                f"the prompt has {len(prompt):,} characters, more than {context:,} ids, and the "
                f"context holds {context:,}: no room for an answer"
            )

    def specials_in(self, text: str) -> list[str]:
        """Control tokens that are written in a text, each once; text without `specials`."""
        return find_tokens(text, self.tokenizer.specials)

    def encode_chat(self, messages: Messages, **options: Unpack[TemplateOptions]) -> list[int]:
        """A conversation -> the ids after which the model writes its answer."""
        return self.encode(self._chat_prompt(messages, options)[0])

    def _chat_prompt(
        self, messages: Messages, options: TemplateOptions
    ) -> tuple[Prompt, ReasoningSplitter | None]:
        """What the model reads of a conversation and its pictures; what splits the answer."""
        messages, sources = split_pictures(messages)
        if self.checkpoint.images is not None:
            messages = as_parts(messages)
        ids, splitter = self._begin_chat(messages, options)
        if not sources:
            return ids, splitter
        pictures = [self.images.read(source) for source in sources]
        return self.images.expand(self.tokenizer, ids, pictures), splitter

    def _begin_chat(
        self, messages: Messages, options: TemplateOptions
    ) -> tuple[list[int], ReasoningSplitter | None]:
        """The ids of a conversation, and what splits the answer to it."""
        if isinstance(messages, str):
            messages = [Message("user", messages)]
        else:
            messages = as_list("messages", messages, "a text or a list of messages")
        given = {name: value for name, value in options.items() if value is not None}
        more, think = given.pop("template_options", {}), given.pop("enable_thinking", None)
        if not isinstance(more, Mapping):
            raise GenerationError(f"template_options must be a dict, got {quoted(more)}")
        if not isinstance(think, bool | None):
            raise GenerationError(f"enable_thinking must be True or False, got {quoted(think)}")
        if think is not None:
            given[self.chat_format.thinking_switch or "enable_thinking"] = think
        return self.chat_format.begin(messages, self.tokenizer, {**more, **given})

    def stream(
        self, prompt: Prompt, *, progress: Progress | None = None, **options: Unpack[Options]
    ) -> TextStream:
        """Continue a prompt, piece by piece; `progress` counts prompt ids read.

        Raises GenerationError (settings, room in the context), TokenizerError.
        """
        return TextStream(self._begin([prompt], options, progress, continues=True))

    def stream_chat(
        self, messages: Messages, *, progress: Progress | None = None,
        **options: Unpack[ChatOptions],
    ) -> TextStream:  # fmt: skip
        """Answer a conversation, piece by piece.

        A message's content may have pictures: `{"type": "image", "path": FILE}`, or `image` with
        what `embed_image` takes. Raises ConfigError if the model reads none.
        """
        values: Any = {**options}
        template: Any = {name: values.pop(name, None) for name in TemplateOptions.__annotations__}
        prompt, splitter = self._chat_prompt(messages, template)
        batch = self._begin([prompt], values, progress, continues=False, splitter=splitter)
        return TextStream(batch)

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Continue a prompt."""
        return self.generate_batch([prompt], **options)[0]

    def chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> Completion:
        """Answer a conversation."""
        stream = self.stream_chat(messages, **options)
        for _ in stream:
            pass
        return stream.completion

    @cached_property
    def images(self) -> ImageReader:
        """What reads pictures. Raises ConfigError: this is a text model."""
        return ImageReader(self.checkpoint)

    def embed_image(self, image: ImageSource) -> NDArray[np.float32]:
        """A picture -> the rows (R, C) that the decoder reads of it.

        `image`: a path, bytes, a Pillow image, uint8 (H, W, 3), or float32 (3, H, W) that is
        preprocessed. Raises ConfigError (a text model), FormatError.
        """
        return self.images.read(image).rows

    def describe(
        self, image: ImageSource, prompt: str = "", **options: Unpack[Options]
    ) -> Completion:
        """Answer a question about a picture, or describe it."""
        stream = self.stream_description(image, prompt, **options)
        for _ in stream:
            pass
        return stream.completion

    def stream_description(
        self, image: ImageSource, prompt: str = "", *, progress: Progress | None = None,
        **options: Unpack[Options],
    ) -> TextStream:  # fmt: skip
        """The same, piece by piece."""
        if not self.images.has_prefix:
            return self.stream_chat(question_about(image, prompt), progress=progress, **options)
        picture = self.images.read(image)
        question = self.images.question(self.tokenizer, prompt, picture)
        return TextStream(self._begin([question], options, progress, continues=False))

    def generate_batch(
        self, prompts: Sequence[Prompt], **options: Unpack[Options]
    ) -> list[Completion]:
        """Continue several prompts side by side: each as it would be continued alone."""
        stream = self.stream_batch(prompts, **options)
        for _ in stream:
            pass
        return stream.completions

    def stream_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        progress: Progress | None = None,
        **options: Unpack[Options],
    ) -> BatchStream:
        """The same, piece by piece: yields (row of the prompt, new text)."""
        prompts = as_list("prompts", prompts, "a list of texts or of ids")
        return self._begin(prompts, options, progress, continues=True)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """(T,) ids -> (T, V): how well every token would follow each of them."""
        given = as_list("logits", ids, "a list of ids")
        ids = checked_ids("logits", given, self.executor.config.vocab_size)
        return logits_of_text(self.executor, ids)

    @cached_property
    def model(self) -> LanguageModel:
        """The PyTorch reference model of this checkpoint, loaded on first use.

        With the torch backend it is the model that generates. Raises MissingExtraError without
        PyTorch, MemoryShortError.
        """
        try:
            from glassllama.weights.load import TorchExecutor, load_model
        except ImportError:
            raise MissingExtraError("the PyTorch reference model", "torch") from None
        if isinstance(self.executor, TorchExecutor):
            return self.executor.model
        return load_model(self.checkpoint)

    def trace(
        self,
        prompt: Prompt,
        *,
        hooks: Sequence[str] = ("*",),
        interventions: Sequence[Intervention] = (),
        positions: Sequence[int] | None = None,
    ) -> Trace:
        """Run `model` on a prompt -> its logits, and the tensors of hooks by name.

        docs/hooks.md lists the names; `hooks` may have wildcards. Interventions replace tensors,
        `positions` are the tokens to record (None: all). See `glassllama.walkthrough.trace`.
        """
        model = self.model
        from glassllama.walkthrough import trace

        ids = self.encode(prompt)
        return trace(model, ids, hooks=hooks, interventions=interventions, positions=positions)

    def _begin(
        self,
        prompts: Sequence[Prompt],
        options: Options,
        progress: Progress | None,
        *,
        continues: bool,
        splitter: ReasoningSplitter | None = None,
    ) -> BatchStream:
        """Check everything, start nothing.

        `continues`: the answer is the prompt's next words. `splitter`: for a single prompt.
        """
        unknown = sorted(set(options) - OPTIONS)
        if unknown:
            first = ", ".join(map(named, unknown[:MOST_UNKNOWN]))
            raise GenerationError(f"unknown options: {first} (see llm.Options)")
        values: dict[str, Any] = {**self.sampling_defaults, **options}
        stop = as_list("stop", values.pop("stop", ()), "a list of texts")
        if not all(isinstance(text, str) for text in stop):
            raise GenerationError(f"stop must be a list of texts, got {quoted(stop)}")
        specials = values.pop("specials", False)
        if not isinstance(specials, bool):
            raise GenerationError(f"specials must be True or False, got {quoted(specials)}")
        loop = {key: values.pop(key) for key in LOOP_OPTIONS if key in values}
        if loop.get("on_overflow") is None:
            loop["on_overflow"] = self.default_overflow
        vocabulary, gaps = choosable_ids(self.tokenizer)
        settings = GenerationSettings(
            sampler=make_sampler(**values), stop_ids=self.tokenizer.stop_ids,
            bos=self.tokenizer.bos, vocabulary=vocabulary, gaps=gaps, **loop,
        )  # fmt: skip
        rows = [self.encode(prompt, specials=specials) for prompt in prompts]
        marks = () if splitter is None else splitter.marks.texts
        answers = [
            RowState(
                ids, Detokenizer(self.tokenizer, continues=continues, shown=marks),
                StopStrings(stop), splitter,
            )
            for ids in rows
        ]  # fmt: skip
        requests = [
            Request.new(
                self.executor, *(
                    (prompt.keys, settings, f"prompt {n}", prompt.rows, prompt.prefix)
                    if isinstance(prompt, ImagePrompt) else (ids, settings, f"prompt {n}")
                ),
            )
            for n, (prompt, ids) in enumerate(zip(prompts, rows, strict=True))
        ]  # fmt: skip
        for request in requests:
            request.keep = not continues  # a conversation goes on
        generation = Generation(self.scheduler, requests, progress)
        return BatchStream(generation, answers, options.get("logprobs") is not None)


def choosable_ids(tokenizer: Tokenizer) -> tuple[int, list[int]]:
    """How many ids a sampler may choose from, and those among them that it may not.

    These have no token, and end no answer: a model may end at a row that its tokenizer lacks.
    """
    size, ends = tokenizer.vocab_size, tokenizer.stop_ids
    count = max(size, *(id + 1 for id in ends)) if ends else size
    return count, [id for id in (*tokenizer.gaps, *range(size, count)) if id not in ends]


def as_list(what: str, given: Any, expected: str) -> list[Any]:
    """What can be gone through, as a list; GenerationError for others.

    A text, bytes and a mapping are others, although they can be gone through.
    """
    single = isinstance(given, str | bytes | bytearray | memoryview | Mapping)
    if single or not isinstance(given, Iterable):
        raise GenerationError(f"{what} must be {expected}, got {quoted(given)}")
    return list(given)


def load(
    name: str | Path = DEFAULT_MODEL,
    *,
    backend: Backend = "auto",
    device: str = "cpu",
    dtype: Dtype | None = None,
    exact: bool = False,
    quantize: Quantize | None = None,
    cache: CacheType = "int16",
    threads: int | None = None,
    offline: bool = False,
    prefer_pth: bool = False,
    stream_layers: bool = False,
    context_size: int | None = None,
    download_progress: Progress | None = None,
    load_progress: Progress | None = None,
) -> LLM:
    """Open a model by short name, path or Hub id (see hub.resolve), and make it ready.

    "auto" is the engine on a CPU and PyTorch elsewhere, for models without a layer plan, or where
    a `dtype` is asked for. `exact` is float32 arithmetic on dequantized weights. `quantize` is what
    the engine makes of float weights; None leaves them, unless memory is too short, which `notes`
    say then. `cache` is how it keeps keys and values: int8 takes half the memory. `stream_layers`
    reads the weights anew for every step, one layer at a time: slow, but any model in little memory
    (PyTorch). `context_size` is the number of tokens of the context, up to the model's longest one;
    see open_checkpoint. A folder of SigLIP gives an `ImageTextModel`. Raises GlassError: what is
    wrong, in one line.
    """
    chosen = choose_backend(backend, device, dtype, stream_layers)
    check_numbers(dtype, quantize, cache, threads)
    path = hub.resolve(str(name), offline=offline, prefer_pth=prefer_pth,
                       progress=download_progress)  # fmt: skip
    if is_siglip(path):
        image_text: Any = ImageTextModel(path, str(name))
        return image_text  # type: ignore[no-any-return]  # its other methods are errors
    started = time.perf_counter()
    checkpoint = open_checkpoint(path, context_size)
    if backend == "auto" and checkpoint.architecture.layer_plan is None:
        chosen = "torch"  # and the checkpoint's notes say why
    check_precision(chosen, dtype, exact, quantize, cache, stream_layers)
    if chosen == "engine":
        from glassllama.weights.pack import pack

        executor: Executor = pack(checkpoint, exact=exact, quantize=quantize, cache=cache,
                                  threads=threads, progress=load_progress)  # fmt: skip
    else:
        stored_dtype = "float32" if exact else dtype
        executor = torch_executor(
            checkpoint, device, stored_dtype, threads, load_progress, stream_layers
        )
    checkpoint.notes.extend(executor.notes)
    return LLM(
        name=str(name),
        checkpoint=checkpoint,
        executor=executor,
        backend=chosen,
        load_seconds=time.perf_counter() - started,
        notes=checkpoint.notes,  # the same list: reading the tokenizer adds to it
    )


def torch_executor(
    checkpoint: Checkpoint,
    device: str,
    dtype: str | None,
    threads: int | None,
    progress: Progress | None,
    stream_layers: bool,
) -> Executor:
    """The reference model, loaded or streamed. Raises MissingExtraError without PyTorch."""
    try:
        import torch
    except ImportError:
        raise MissingExtraError("the torch backend", "torch") from None
    from glassllama.weights.load import TorchExecutor, load_model, streamed_model, torch_device

    if threads is not None:
        torch.set_num_threads(threads)
    where = torch_device(device)
    torch_dtype = None if dtype is None else getattr(torch, dtype)
    if stream_layers:
        return TorchExecutor(streamed_model(checkpoint, device=where, dtype=torch_dtype))
    return TorchExecutor(load_model(checkpoint, device=where, dtype=torch_dtype, progress=progress))
