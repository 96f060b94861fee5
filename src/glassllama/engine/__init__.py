"""The CPU executor: packed weights, compiled loops, no torch.

Read model.py (the step, as a forward pass), then layout.py (how weights lie in memory), kernels.py
(matrix times rows), attention.py, and executor.py (the way in).
"""
