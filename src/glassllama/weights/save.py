"""A model → a folder that `load`, and Hugging Face's own code, can read."""

from __future__ import annotations

from pathlib import Path

from glassllama.base.interfaces import Tokenizer
from glassllama.models.language_model import LanguageModel


def save_model(folder: Path, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Write weights, configuration and vocabulary as one folder, all or nothing."""
