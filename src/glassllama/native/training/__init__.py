"""Fused blocks and kernels for training a Llama on a CPU."""
