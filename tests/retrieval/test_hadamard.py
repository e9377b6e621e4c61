"""The rotation keeps products and spreads what one dimension holds."""

import pytest
import torch

from retrieval.hadamard import hadamard, rotation

DIMS = [1, 2, 3, 48, 64, 80, 96, 112, 128, 192, 256]


@pytest.mark.parametrize("dim", DIMS)
def test_it_is_orthogonal_and_the_same_again(dim):
    matrix = rotation(dim)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(dim), rtol=0, atol=1e-6)
    rotation.cache_clear()
    assert torch.equal(matrix, rotation(dim))
    if dim > 3:
        assert not torch.equal(matrix, rotation(dim, 1))


@pytest.mark.parametrize("dim", DIMS[3:])
def test_no_dimension_keeps_more_than_a_little_to_itself(dim):
    assert rotation(dim).square().max() <= 8 / dim


def test_hadamard_matrices_are_symmetric_and_their_own_inverse():
    for size in (1, 2, 16, 128):
        matrix = hadamard(size)
        assert torch.equal(matrix, matrix.mT)
        torch.testing.assert_close(matrix @ matrix, torch.eye(size))
