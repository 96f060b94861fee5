"""The eighteen steps in order, from the bytes of a prompt to the time it took."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from glassllama.base.errors import GlassError
from glassllama.walkthrough.step import Step, StepMismatchError
from glassllama.walkthrough.steps.attention import into_the_residual, rope, scores_and_weights
from glassllama.walkthrough.steps.feed_forward_logits import all_layers, answer, swiglu
from glassllama.walkthrough.steps.input import (
    configuration,
    embedding,
    prompt_bytes,
    token_ids,
    weight_file,
)
from glassllama.walkthrough.steps.kv_cache import second_token
from glassllama.walkthrough.steps.qkv import groups, norm, queries_keys_values
from glassllama.walkthrough.steps.quantization import quantisation
from glassllama.walkthrough.steps.sampling import sampling
from glassllama.walkthrough.steps.timing import where_the_time_went
from glassllama.walkthrough.walk import DamagedWeightsError, Walk

STEPS: tuple[Callable[[Walk], Step], ...] = (
    prompt_bytes,
    token_ids,
    weight_file,
    configuration,
    embedding,
    norm,
    queries_keys_values,
    groups,
    rope,
    scores_and_weights,
    into_the_residual,
    swiglu,
    all_layers,
    answer,
    sampling,
    second_token,
    quantisation,
    where_the_time_went,
)
# Place -> the number of the step that explains it: the first pattern that matches.
EXPLAINED = (
    ("tok_embeddings", 4),
    ("layers.*.attention_norm", 5),
    ("layers.*.attention.w[qkv]", 6),
    ("layers.*.attention.[qkv]", 6),
    ("layers.*.attention.?_rope", 8),
    ("layers.*.attention.scores", 9),
    ("layers.*.attention.weights", 9),
    ("layers.*.a*", 10),
    ("layers.*", 11),
    ("*", 13),
)


def take_step(walk: Walk, number: int) -> Step:
    """One step. Raises StepMismatchError where it is not what the running model does.

    DamagedWeightsError, where NaN or infinities appear, names the step that explains the place.
    """
    require_step(number)
    try:
        return STEPS[number](walk)
    except StepMismatchError as error:
        raise StepMismatchError(f"step {title(number)}: {error}") from None
    except DamagedWeightsError as error:
        raise DamagedWeightsError(
            error.place, f"step {title(step_of(error.place))}: {error}"
        ) from None


def require_step(number: int) -> None:
    if not 0 <= number < len(STEPS):
        raise GlassError(f"--step {number} is out of range: there are 0 … {len(STEPS) - 1}")


def step_of(place: str) -> int:
    """Which step explains what happens at a place of the model."""
    return next(number for pattern, number in EXPLAINED if fnmatchcase(place, pattern))


def title(number: int) -> str:
    """`6, queries keys values`: how errors call a step."""
    return f"{number}, {STEPS[number].__name__.replace('_', ' ')}"
