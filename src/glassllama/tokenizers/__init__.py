"""Text ↔ ids: pre-tokenization, BPE, SentencePiece, chat formats, streaming, learning vocabularies.

Everything here is plain Python. The loops that can be compiled are behind `backend.BPEBackend`;
without a compiled backend the same ids are computed more slowly.
"""
