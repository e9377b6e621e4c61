"""Kernels that find, fetch and write the rows of a batch: one file each, maths beside the code."""
