"""Errors that a user can do something about, and helpers for their messages.

Each is a `GlassError`: its message is one line with the file or field, the value found, the value
expected, and what to do. The command line prints that line and exits with code 1. Any other
exception that leaves the package is a bug.
"""

import reprlib
from collections.abc import Collection

QUOTED_CHARACTERS = 80
MOST_NAMES = 12  # names from files in one message; the others are only counted


class GlassError(Exception):
    """An error with a message of one line; the command line exits with code 1."""


class FormatError(GlassError):
    """A file's bytes are not what its format says (GGUF, safetensors, .pth, JSON)."""


class ConfigError(GlassError):
    """A model configuration is incomplete, contradictory or of an unsupported kind."""


class WeightsError(GlassError):
    """The tensors of a checkpoint do not fit the model: every mismatch is listed."""


class TokenizerError(GlassError):
    """A vocabulary cannot be read, or text or ids cannot be translated with it."""


class GenerationError(GlassError):
    """Generation cannot start or continue: bad settings, context full, NaN in the logits."""


class MemoryShortError(GlassError):
    """Not enough memory: the message has the required and the free memory, and an alternative."""


class DownloadError(GlassError):
    """A model could not be fetched: no network, no permission, or a damaged file."""


class UntrustedError(GlassError):
    """A folder of the cache is another user's, or others can write to it: it is not used."""


class TrainingError(GlassError):
    """A run cannot start or continue: bad data, non-finite numbers, a checkpoint of another run."""


class PreflightError(TrainingError):
    """A check before the first training step found a bug, which the message names."""


class MissingExtraError(GlassError):
    """An optional part is not installed: the message is the `pip install` line to run."""

    def __init__(self, purpose: str, extra: str) -> None:
        super().__init__(f"{purpose} needs an extra: pip install 'glassllama[{extra}]'")


class _ShortRepr(reprlib.Repr):
    """repr that stays short whatever the value: long text, lists and numbers are cut."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = QUOTED_CHARACTERS

    def repr_int(self, value: int, _level: int) -> str:
        if -(2**128) < value < 2**128:
            return repr(value)
        return f"<a whole number of {value.bit_length()} bits>"  # Python limits its digits


_short = _ShortRepr()


def quoted(value: object) -> str:
    """A foreign value for an error message: one line, escaped, at most 80 characters."""
    text = _short.repr(value).replace("\n", " ")  # NumPy's arrays are shown in several lines
    return text if len(text) <= QUOTED_CHARACTERS else text[: QUOTED_CHARACTERS - 1] + "…"


def named(name: str) -> str:
    """A foreign name for a message: as it is where that is short printable ASCII, else quoted."""
    plain = len(name) <= QUOTED_CHARACTERS and name.isascii() and name.isprintable()
    return name if plain else quoted(name)


def join_names(names: Collection[str], separator: str = ", ") -> str:
    """Foreign names for a message: the first twelve, and how many more there are."""
    shown = separator.join(named(name) for name in sorted(names)[:MOST_NAMES])
    more = len(names) - MOST_NAMES
    return f"{shown}{separator}and {more} more" if more > 0 else shown
