"""Bytes on disk → named tensors, memory-mapped: GGUF, safetensors, .pth. No models, no torch."""
