"""What can go wrong in training, as errors of one line."""

from __future__ import annotations

from glassllama.base.errors import GlassError


class TrainingError(GlassError):
    """A run cannot start or go on: bad data, non-finite numbers, a checkpoint that does not fit."""


class PreflightError(TrainingError):
    """A check before the run found a bug, which the message names."""
