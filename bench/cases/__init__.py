"""Kernels at the sizes of real use: one module per kernel, see `bench.kernel_case`."""
