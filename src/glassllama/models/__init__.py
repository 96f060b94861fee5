"""Reference models in PyTorch, one architecture a file, read top to bottom."""
