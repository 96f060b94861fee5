"""Text ↔ ids: splitting, byte pairs, SentencePiece, chat formats, text while it is made.

Learning a vocabulary of one's own (`tokenizers/train.py`):

    train_bpe(texts: Iterable[str], vocab_size: int, specials: Sequence[str] = (), *,
              split: str = "llama3", progress: Progress | None = None) -> TrainedBPE
    TrainedBPE.tokenizer -> BytePairTokenizer      its encode_array is the fast way for corpora
    TrainedBPE.save(folder: Path) -> list[Path]    tokenizer.json and more; tokenizer_from_folder
                                                   reads them back
"""
