"""From logits to one id: penalties, temperature, filters, and a draw that a seed repeats.

Each step is a small frozen dataclass that maps logits (V,) float32 to logits of the same shape and
leaves its input alone; what a filter removes becomes -inf. A `Sampler` is a tuple of steps in this
order, which is also transformers':

    repetition → presence and frequency → temperature → top-k → top-p → min-p → draw

Letters: V vocabulary. Steps compute in float32, as the logits come. Where probabilities are added
up, in top-p and the draw, they are whole numbers (`weights_of`), so that a sum is the same in any
order, and a seed draws the same ids on every processor. Ties at the threshold of top-k and top-p
stay: no id is preferred for its number.

The engine has the same in compiled loops, native/engine/sampling.py, the same to the id.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from glassllama.base.errors import GenerationError, quoted
from glassllama.base.interfaces import NativeSampler

Logits = NDArray[np.float32]  # (V,)

UNIT = float(2**34)  # the likeliest id's weight: 2**19 of them add up without rounding
LOG2_E = np.float32(1.4426950408889634)
LN2_UPPER = np.float32(0.693359375)  # few bits: its product with a whole number is exact
LN2_LOWER = np.float32(-2.12194440e-4)
LOWEST = np.float32(-87.3)  # e^x below this is no normal float32


class History:
    """The ids of a request so far: whether prompt or answer hold an id, how often the answer does.

    Two arrays of (V,).
    """

    def __init__(self, prompt: Sequence[int], vocab_size: int) -> None:
        self.seen = np.zeros(vocab_size, dtype=bool)  # in the prompt or the answer
        self.counts = np.zeros(vocab_size, dtype=np.int32)  # times in the answer
        self.seen[np.asarray(prompt, dtype=np.intp)] = True

    def add(self, id: int) -> None:
        self.seen[id] = True
        self.counts[id] += 1


def require_number(field: str, value: object) -> None:
    """Raise a GenerationError that names the setting, what came and what is allowed."""
    if not isinstance(value, int | float | np.number) or isinstance(value, bool):
        raise GenerationError(f"{field} must be a number, got {quoted(value)}")


def require_whole(field: str, value: object, least: int) -> None:
    """The same for settings that count."""
    inside = isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= least
    if not inside:
        raise GenerationError(
            f"{field} must be a whole number of at least {least}, got {quoted(value)}"
        )


@dataclass(frozen=True)
class LogitsStep:
    """One step between the model and the draw, with the value of one setting.

    `default` is the setting's value without the step, `native` its name for a native sampler.
    """

    value: float
    setting: ClassVar[str]
    default: ClassVar[float | None]
    native: ClassVar[str]
    allowed: ClassVar[str]
    limits: ClassVar[tuple[float, float]]  # both are allowed

    def __post_init__(self) -> None:
        least, most = self.limits
        if not least <= self.value <= most:
            message = f"{self.setting} must be {self.allowed}, got {quoted(self.value)}"
            raise GenerationError(message)

    @property
    def native_value(self) -> float:
        return self.value

    def __call__(self, logits: Logits, history: History) -> Logits:
        raise NotImplementedError


class Repetition(LogitsStep):
    """Make every id of prompt and answer less likely: CTRL (Keskar et al., 2019), section 4.1.

    Positive logits are divided by the penalty, negative ones multiplied, so both move down.
    """

    setting, default, native = "repetition_penalty", 1.0, "repetition"
    allowed, limits = "from 0.001 to 1000", (1e-3, 1e3)

    def __call__(self, logits: Logits, history: History) -> Logits:
        ids, penalty = np.flatnonzero(history.seen), np.float32(self.value)
        old = logits[ids]
        out = logits.copy()
        out[ids] = np.where(old > 0, old / penalty, old * penalty)
        return out


class Presence(LogitsStep):
    """Take a fixed amount off the logits of ids already in the answer (OpenAI API reference)."""

    setting, default, native = "presence_penalty", 0.0, "presence"
    allowed, limits = "between -2 and 2", (-2.0, 2.0)  # as in OpenAI's API

    def __call__(self, logits: Logits, history: History) -> Logits:
        return np.where(history.counts > 0, logits - np.float32(self.value), logits)


class Frequency(LogitsStep):
    """Take an amount off for every time the answer holds the id (OpenAI API reference)."""

    setting, default, native = "frequency_penalty", 0.0, "frequency"
    allowed, limits = "between -2 and 2", (-2.0, 2.0)

    def __call__(self, logits: Logits, history: History) -> Logits:
        return logits - np.float32(self.value) * history.counts.astype(np.float32)


class Temperature(LogitsStep):
    """Divide the logits: below 1 the likely ids win more often, above 1 less often.

    Beyond the limits float32 has nothing left to tell apart.
    """

    setting, default, native = "temperature", 1.0, "temperature"
    allowed, limits = "0 (greedy) or from 1e-06 to 1e+06", (1e-6, 1e6)

    def __call__(self, logits: Logits, history: History) -> Logits:
        with np.errstate(over="ignore"):  # what overflows is -inf: impossible
            out: Logits = below_largest(logits) / np.float32(self.value)
        return out


class TopK(LogitsStep):
    """Keep the k largest logits."""

    value: int
    setting, default, native = "top_k", None, "top_k"

    def __post_init__(self) -> None:
        require_whole("top_k", self.value, 1)

    def __call__(self, logits: Logits, history: History) -> Logits:
        if self.value >= len(logits):
            return logits
        threshold = np.partition(logits, -self.value)[-self.value]  # a selection, no sort
        return keep(logits, logits >= threshold)


class TopP(LogitsStep):
    """Keep the nucleus: the likeliest ids that together reach probability p.

    Source: The Curious Case of Neural Text Degeneration (Holtzman et al., 2019), section 3.1.
    """

    setting, default, native = "top_p", 1.0, "top_p"
    allowed, limits = "above 0 and at most 1", (math.ulp(0.0), 1.0)

    def __call__(self, logits: Logits, history: History) -> Logits:
        p = self.value
        if p == 1:
            return logits
        weights = weights_of(logits)
        total = weights.sum()
        # All ids below this weight together have less than 1 - p, so none of them is needed: only
        # the few above it are sorted.
        needless = (1 - p) * total / len(weights)
        ordered = np.sort(np.compress(weights >= needless, weights))[::-1]
        threshold = ordered[min(np.searchsorted(ordered.cumsum(), p * total), len(ordered) - 1)]
        return keep(logits, weights >= threshold)


class MinP(LogitsStep):
    """Keep ids at least p times as likely as the likeliest one: Min-p (Nguyen et al., 2024)."""

    setting, default, native = "min_p", 0.0, "distance"
    allowed, limits = "at least 0 and at most 1", (0.0, 1.0)

    def __call__(self, logits: Logits, history: History) -> Logits:
        return keep(logits, logits >= logits.max() - self.native_value)

    @property
    def native_value(self) -> float:
        """The distance from the largest logit, at most."""
        return -math.log(self.value) if self.value > 0 else math.inf


PENALTIES: list[type[LogitsStep]] = [Repetition, Presence, Frequency]
# None of these ever removes the largest logit: greedy has no need of them.
DRAWING: list[type[LogitsStep]] = [Temperature, TopK, TopP, MinP]


def below_largest(logits: Logits) -> Logits:
    """Logits shifted so that the largest is 0, which changes no probability."""
    with np.errstate(over="ignore"):  # what overflows is -inf: impossible
        out: Logits = logits - logits.max()
    return out


def unscaled_probs(logits: Logits) -> Logits:
    """Probabilities times a constant: 1 for the likeliest, 0 for what was removed."""
    return np.exp(below_largest(logits))


def weights_of(logits: Logits) -> NDArray[np.float64]:
    """Probabilities times a constant, as whole numbers: 2**34 for the likeliest."""
    return np.rint(exponential(below_largest(logits)).astype(np.float64) * UNIT)


def exponential(x: Logits) -> Logits:
    """e^x for x ≤ 0, to 2 units in the last place, in operations that every processor rounds alike.

    x = n·ln 2 + r with |r| ≤ ln(2)/2; e^r by its Taylor polynomial of degree 7 (remainder 5e-9).
    """
    x = np.maximum(x, LOWEST)
    n = np.rint(x * LOG2_E)
    r = (x - n * LN2_UPPER) - n * LN2_LOWER
    power = np.full_like(r, 1 / math.factorial(7))
    for degree in range(6, -1, -1):
        power = power * r + np.float32(1 / math.factorial(degree))
    out: Logits = np.ldexp(power, n.astype(np.int32))
    return out


def masked(logits: Logits, gaps: Sequence[int]) -> Logits:
    """Logits with ids that have no token made impossible; a copy where there are any."""
    if gaps:
        logits = logits.copy()
        logits[gaps] = -np.inf
    return logits


def keep(logits: Logits, is_chosen: NDArray[np.bool_]) -> Logits:
    ids = np.flatnonzero(is_chosen)  # few, mostly: writing them costs less than np.where
    out = np.full_like(logits, -np.inf)
    out[ids] = logits[ids]
    return out


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How ids are chosen: the steps in order, then the largest (`greedy`) or a draw by `seed`."""

    steps: tuple[Callable[[Logits, History], Logits], ...] = ()
    greedy: bool = True
    seed: int | None = None  # None: another answer every time

    def __post_init__(self) -> None:
        if self.seed is not None:
            require_whole("seed", self.seed, 0)

    def start(
        self,
        prompt: Sequence[int],
        vocab_size: int,
        native: Callable[..., NativeSampler] | None = None,
    ) -> SamplerState:
        """The state for one request, with a history and a random generator of its own.

        `native` makes an executor's native sampler; without it NumPy computes the steps.
        """
        history = History(prompt, vocab_size)
        generator = np.random.Generator(np.random.PCG64(self.seed))
        settings = self._settings()
        compiled = None
        if native is not None and settings is not None:
            compiled = native(vocab_size=vocab_size, **settings)
        return SamplerState(self, history, generator, compiled)

    def _settings(self) -> dict[str, float] | None:
        """The steps as plain numbers, for `native`; None where they are not those of this file."""
        kinds = [type(step) for step in self.steps]
        if kinds != [kind for kind in (*PENALTIES, *DRAWING) if kind in kinds]:
            return None
        known = [step for step in self.steps if isinstance(step, LogitsStep)]
        settings = {step.native: step.native_value for step in known}
        return settings | {"temperature": 0.0} if self.greedy else settings


def make_sampler(
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int | None = None,
) -> Sampler:
    """A sampler from plain settings; those at their defaults cost nothing.

    Temperature 0 is greedy. Repetition counts prompt and answer, presence and frequency the answer
    alone. Raises GenerationError that names a bad setting, its value and its range.
    """
    greedy = temperature == 0
    values: dict[str, Any] = {
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "temperature": 1.0 if greedy else temperature,
        "top_p": top_p, "min_p": min_p,
    }  # fmt: skip
    for setting, value in values.items():
        require_number(setting, value)
    values["top_k"] = top_k
    penalties, drawing = (
        tuple(kind(values[kind.setting]) for kind in kinds if values[kind.setting] != kind.default)
        for kinds in (PENALTIES, DRAWING)
    )
    return Sampler(steps=penalties if greedy else penalties + drawing, greedy=greedy, seed=seed)


GREEDY = Sampler()


@dataclass
class SamplerState:
    """The sampling state of one request: its history and its random generator."""

    sampler: Sampler
    history: History
    generator: np.random.Generator = field(repr=False)
    native: NativeSampler | None = None

    def choose(self, logits: Logits) -> int:
        """The next id for logits (V,), remembered.

        Raises GenerationError where they hold NaN, +inf or -inf alone: nothing is chosen then.
        """
        native = self.native
        id = self._plain(logits) if native is None else self._compiled(logits, native)
        if id < 0:
            raise GenerationError(f"the logits hold {trouble(logits)}")
        self.history.add(id)
        return id

    def _plain(self, logits: Logits) -> int:
        if not np.isfinite(logits.max()):  # NaN and +inf anywhere show here, so do -inf alone
            return -1
        with np.errstate(over="ignore", invalid="ignore"):  # looked at below
            for step in self.sampler.steps:
                logits = step(logits, self.history)
        if not np.isfinite(logits.max()):
            return -1
        return int(logits.argmax()) if self.sampler.greedy else draw(logits, self.generator)

    def _compiled(self, logits: Logits, native: NativeSampler) -> int:
        uniform = 0.0 if self.sampler.greedy else self.generator.random()
        return native(logits, self.history.seen, self.history.counts, uniform)


def trouble(logits: Logits) -> str:
    """What is in logits that no id can be chosen by."""
    nan, inf = int(np.isnan(logits).sum()), int(np.isposinf(logits).sum())
    if nan or inf:
        return f"{nan} NaN and {inf} Inf of {len(logits)}"
    return "-Inf alone" if np.isneginf(logits).all() else "numbers too large for the penalties"


def draw(logits: Logits, generator: np.random.Generator) -> int:
    """An id by its probability: where one uniform number falls in the cumulative sum."""
    ids = np.flatnonzero(logits > -np.inf)
    sums = weights_of(logits[ids]).cumsum()
    goal = min(math.floor(generator.random() * sums[-1]), sums[-1] - 1)
    return int(ids[np.searchsorted(sums, goal, "right")])


def logprobs_of(logits: Logits, ids: Iterable[int]) -> list[float]:
    """Natural logarithms of the model's own probabilities of `ids`, from logits (V,)."""
    largest = float(logits.max())
    total = float(unscaled_probs(logits).sum(dtype=np.float64))
    return [float(logits[id]) - largest - math.log(total) for id in ids]


def likeliest(logits: Logits, n: int) -> list[int]:
    """The n ids of largest logits, largest first, equal ones by number."""
    n = min(operator.index(n), len(logits))
    if n == 0:
        return []
    threshold = np.partition(logits, -n)[-n]
    ids = np.flatnonzero(logits >= threshold)
    return [int(id) for id in ids[np.argsort(-logits[ids], kind="stable")][:n]]
