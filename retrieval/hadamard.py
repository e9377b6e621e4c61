"""A rotation that spreads what single dimensions hold over all of them."""

import functools

import torch
from jaxtyping import Float
from torch import Tensor


@functools.cache
def rotation(dim: int, seed: int = 0, device: torch.device | str = "cpu") -> Float[Tensor, "D D"]:
    """An orthogonal matrix: random signs, then a Hadamard transform; `x @ rotation` rotates rows.

    Where `dim` is no power of two, the largest one within it is transformed twice: the first and
    then, with other signs, the last dimensions. They overlap, so that all are mixed. The same
    matrix for the same arguments, on every machine; shared, so do not write into it.
    """
    size = 1 << dim.bit_length() - 1
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (2, dim), generator=generator).float() * 2 - 1
    matrix = signs[0, :, None] * _placed(size, 0, dim)
    if size < dim:
        matrix = (matrix * signs[1]) @ _placed(size, dim - size, dim)
    return matrix.to(device)


def _placed(size: int, at: int, dim: int) -> Float[Tensor, "D D"]:
    """The transform of `size` dimensions from `at` on; the others stay as they are."""
    matrix = torch.eye(dim, dtype=torch.float32)
    matrix[at : at + size, at : at + size] = hadamard(size)
    return matrix


def hadamard(size: int) -> Float[Tensor, "D D"]:
    """The orthonormal, symmetric Hadamard matrix (Sylvester's) of a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float32)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * size**-0.5
