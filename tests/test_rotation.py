"""The rotation is orthonormal, symmetric, its own inverse up to the signs, and mixes blocks of at least 512."""

import pytest
import torch

from glq import GlqError
from glq.rotation import MIN_BLOCK, block_width, hadamard, odd_part, random_signs, rotate, unrotate

WIDTHS = [1, 2, 48, 96, 100, 128, 576, 640, 769, 896, 1536, 4096, 11008, 14336]


@pytest.mark.parametrize("width", WIDTHS)
def test_blocks_are_wide_and_divide(width):
    block = block_width(width)
    assert width % block == 0
    assert block >= min(width, MIN_BLOCK)


@pytest.mark.parametrize(("width", "block"), [(576, 576), (1536, 512), (4096, 2048), (14336, 2048), (11008, 1376)])
def test_blocks_of_common_widths(width, block):
    assert block_width(width) == block


@pytest.mark.parametrize(("width", "shards"), [(576, 2), (1536, 2), (4096, 8)])
def test_blocks_stay_inside_a_shard(width, shards):
    assert (width // shards) % block_width(width, shards) == 0


def test_unequal_shards_are_refused():
    with pytest.raises(GlqError, match="cannot cut 576 .* into 5"):
        block_width(576, 5)


@pytest.mark.parametrize("block", [1, 2, 48, 64, 96, 128, 576, 769, 1376, 2048])
def test_hadamard_is_orthonormal_and_symmetric(block):
    h = hadamard(torch.eye(block, dtype=torch.float64), block)
    torch.testing.assert_close(h @ h.T, torch.eye(block, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(h, h.T, rtol=0, atol=1e-12)


def test_hadamard_is_the_kronecker_product_of_the_documented_factors():
    m, p = 9, 64
    i = torch.arange(m, dtype=torch.float64)
    angle = 2 * torch.pi * i[:, None] * i / m
    hartley = (angle.cos() + angle.sin()) / m**0.5
    sylvester = torch.tensor([[(-1.0) ** bin(a & b).count("1") for b in range(p)] for a in range(p)]).double() / p**0.5
    x = torch.randn(3, m * p, dtype=torch.float64)
    torch.testing.assert_close(hadamard(x, m * p), x @ torch.kron(hartley, sylvester).T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_rotated_product_is_the_product(width):
    signs = random_signs(width, torch.Generator().manual_seed(3))
    block = block_width(width)
    w, x = torch.randn(5, width, dtype=torch.float64), torch.randn(2, 3, width, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, signs, block) @ rotate(w, signs, block).T, x @ w.T)
    torch.testing.assert_close(unrotate(rotate(x, signs, block), signs, block), x)


def test_a_rotated_spike_is_spread():
    x = torch.zeros(1, 576)
    x[0, 17] = 24.0
    assert rotate(x, random_signs(576, torch.Generator()), 576).abs().max() < 24.0 / 10
    assert odd_part(576) == 9
