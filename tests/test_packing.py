"""The tile layout: pack and unpack are inverse, and the bytes are those that docs/FORMAT.md describes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glq.codecs import CODECS
from glq.codecs.packing import from_groups, pack, tile_grid, to_groups, unpack
from glq.packed import decode_matrix, pack_signs, packed_shapes, unpack_signs

BITS = sorted({codec.code_bits for codec in CODECS.values()})


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from(BITS), st.integers(0, 2**32))
def test_unpack_inverts_pack(row_tiles, col_tiles, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (row_tiles, 8, col_tiles * 32), generator=generator)
    packed = pack(codes, bits)
    assert packed.shape == (row_tiles, col_tiles, 32 * bits)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_byte_pattern_is_a_code(bits):
    packed = torch.randint(0, 256, (2, 3, 32 * bits), dtype=torch.uint8)
    assert torch.equal(pack(unpack(packed, bits), bits), packed)


def test_groups_are_four_rows_eight_apart_and_two_columns():
    w = torch.arange(64 * 20.0).view(64, 20)
    groups = to_groups(w)
    assert torch.equal(from_groups(groups, 64), w)
    tile, g, j = 1, 3, 4
    expected = [w[32 * tile + 8 * i + g, 2 * j + e] for i in range(4) for e in range(2)]
    assert groups[(tile * 8 + g) * 10 + j].tolist() == expected


@pytest.mark.parametrize("name", CODECS)
def test_one_weight_from_its_bytes_alone(name):
    """A reader that follows docs/FORMAT.md, byte by byte, finds the weights that decode_matrix finds."""
    codec = CODECS[name]
    bits = codec.code_bits
    rows, cols = 70, 130
    packed = torch.randint(0, 256, packed_shapes(name, rows, cols)["codes"], dtype=torch.uint8)
    matrix = decode_matrix(packed, name, rows, cols)
    assert matrix.shape == (rows, cols)
    pieces, left, start = [], bits, 0
    for size in (16, 8, 4):
        while left >= size:
            pieces.append((start, size))
            start, left = start + size, left - size
    for row, col in ((0, 0), (9, 3), (33, 64), (69, 129), (42, 77)):
        tile = packed[row // 32, col // 64].tolist()
        i, g = row % 32 // 8, row % 8
        lane = g * 4 + col % 64 // 16
        payload = [b for at, size in pieces for b in tile[at * 32 + lane * size : at * 32 + (lane + 1) * size]]
        number = int.from_bytes(bytes(payload), "little")
        slot = col % 16 // 2
        code = number >> slot * bits & (1 << bits) - 1
        assert matrix[row, col] == codec.decode(torch.tensor([code]))[0, 2 * i + col % 2]


def test_grid_covers_ragged_sizes():
    assert tile_grid(1, 1) == (1, 1)
    assert tile_grid(32, 64) == (1, 1)
    assert tile_grid(33, 65) == (2, 2)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 100), st.integers(0, 2**32))
def test_signs_survive_packing(n, seed):
    signs = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    packed = pack_signs(signs)
    assert packed.numel() == -(-n // 8)
    assert torch.equal(unpack_signs(packed, n), signs)
