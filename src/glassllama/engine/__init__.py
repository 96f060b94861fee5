"""The CPU executor: packed weights, compiled loops, no torch.

Read model.py (the step, as a forward pass), then layout.py (how weights lie in memory), engine/gemm_plain.py
(matrix times rows), engine/attention_kernels.py, and executor.py (the way in).
"""
