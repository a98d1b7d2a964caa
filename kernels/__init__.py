"""Triton kernels, one file per op: ``@triton.jit`` functions and their launchers."""
