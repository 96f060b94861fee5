"""The eighteen steps, from the bytes of a prompt to the time it took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase

from glassllama.base.errors import GlassError
from glassllama.walkthrough.step import Step, StepMismatchError
from glassllama.walkthrough.steps import attention, input, output
from glassllama.walkthrough.walkthrough import DamagedWeightsError, Walkthrough

STEPS: list[Callable[[Walkthrough], Step]] = [*input.STEPS, *attention.STEPS, *output.STEPS]
# Pattern of hook names -> the number of the step that explains them. The first match counts.
STEP_OF_HOOK = (
    ("*embeddings", 4),
    ("layers.*.attention_norm", 5),
    ("layers.*.attention.w[qkv]", 6),
    ("layers.*.attention.[qkv]", 6),
    ("layers.*.attention.?_norm", 6),
    ("layers.*.post_attention_norm", 10),
    ("layers.*.attention.?_rope", 8),
    ("layers.*.attention.scores", 9),
    ("layers.*.attention.weights", 9),
    ("layers.*.feed_forward*", 11),
    ("layers.*.a*", 10),
    ("layers.*", 11),
    ("*", 13),
)


def run_step(walk: Walkthrough, number: int) -> Step:
    """One step. Raises StepMismatchError if it does not get the results of the running model.

    The message of a DamagedWeightsError (NaN, infinities) names the step that explains the hook.
    """
    require_step(number)
    try:
        return replace(STEPS[number](walk), number=number)
    except StepMismatchError as error:
        raise StepMismatchError(f"step {step_title(number)}: {error}") from None
    except DamagedWeightsError as error:
        title = step_title(step_of_hook(error.hook))
        raise DamagedWeightsError(error.hook, f"step {title}: {error}") from None


def require_step(number: int) -> None:
    if not 0 <= number < len(STEPS):
        raise GlassError(f"--step {number} is out of range: there are 0 … {len(STEPS) - 1}")


def step_of_hook(name: str) -> int:
    """The step that explains the tensor of a hook."""
    return next(number for pattern, number in STEP_OF_HOOK if fnmatchcase(name, pattern))


def step_title(number: int) -> str:
    """`6, queries keys values`: used in error messages."""
    return f"{number}, {STEPS[number].__name__.replace('_', ' ')}"
