"""Kernels: one file each, with the maths beside the fast version."""
