"""The CPU engine: packed weights and compiled loops, without PyTorch.

Read executor.py (the interface), model.py (one forward step), then layout.py (packed weights),
gemm_plain.py (matrix products) and attention_kernels.py.
"""
