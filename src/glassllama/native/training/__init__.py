"""Compiled kernels for training on a CPU, and a Llama block made of them."""
