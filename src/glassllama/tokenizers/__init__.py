"""Text ↔ ids: splitting, byte pairs, SentencePiece, chat formats, text while it is made."""
