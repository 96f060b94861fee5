"""The one check that the configurations of bigram and GPT share."""

from __future__ import annotations

from glassllama.base.errors import ConfigError


def require_sizes(config: object, *fields: str) -> None:
    """Raise ConfigError unless each of these fields is a positive whole number."""
    for field in fields:
        value = getattr(config, field)
        if type(value) is not int or value <= 0:
            raise ConfigError(f"{field} must be a positive whole number, got {value!r}")
