"""Everything that is compiled: the CPU engine, the loops of tokenizers, kernels for training.

Each part implements what a plain package states in Python, and a test ties the two.
"""
