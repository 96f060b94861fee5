"""Compiling with Numba and LLVM: decorators, cached machine code, instructions, memory."""
