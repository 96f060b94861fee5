"""Errors that speak to the person who made them.

Every fault that a user can do something about is a `GlassError`: its message is one line that names
the file or field, what came, what was expected, and what to do. The command line prints that line
and exits with 1; anything else that escapes is a bug of ours.
"""


class GlassError(Exception):
    """A fault with a one-line explanation; the command line exits with 1."""


class FormatError(GlassError):
    """A file's bytes are not what its format says (GGUF, safetensors, .pth, JSON)."""


class ConfigError(GlassError):
    """A model configuration is incomplete, contradictory or of an unsupported kind."""


class WeightsError(GlassError):
    """The tensors of a checkpoint do not fit the model: every mismatch is listed."""


class TokenizerError(GlassError):
    """A vocabulary cannot be read, or text or ids cannot be translated with it."""


class GenerationError(GlassError):
    """Generation cannot start or go on: bad settings, context full, NaN in the logits."""


class MemoryShortError(GlassError):
    """Too big for this machine: says what is needed, what there is, and another way."""


class DownloadError(GlassError):
    """A model could not be fetched: no network, no permission, or a damaged file."""


class MissingExtraError(GlassError):
    """An optional part is not installed: the message is the `pip install` line to run."""

    def __init__(self, purpose: str, extra: str) -> None:
        super().__init__(f"{purpose} needs an extra: pip install 'glassllama[{extra}]'")
