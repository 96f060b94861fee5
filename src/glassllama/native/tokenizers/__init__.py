"""Compiled loops of the tokenizers: corpora to ids and back, and learning a vocabulary."""
