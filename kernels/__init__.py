"""Kernels: one operator, one folder, imported as ``dbf_compile.kernels.<operator>``."""
