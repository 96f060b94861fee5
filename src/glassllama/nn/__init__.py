"""Modules of the PyTorch models: norm, RoPE, attention, feed-forward, KV cache, hooks."""
