"""The tile layout: pack and unpack are inverse, and the bytes are those that docs/FORMAT.md describes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glq.codecs import CODECS
from glq.codecs.packing import from_strips, pack, tile_grid, to_strips, unpack
from glq.packed import decode_matrix, pack_signs, packed_shapes, unpack_signs

BITS = sorted({codec.code_bits for codec in CODECS.values()})


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from(BITS), st.integers(0, 2**32))
def test_unpack_inverts_pack(row_tiles, col_tiles, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    halves = torch.randint(0, 2**32, (2, row_tiles, col_tiles * 32, 8), generator=generator)
    codes = (halves[0] << 32 | halves[1]) & (2**bits - 1 if bits < 64 else -1)
    packed = pack(codes, bits)
    assert packed.shape == (row_tiles, col_tiles, 32 * bits)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_byte_pattern_is_a_code(bits):
    packed = torch.randint(0, 256, (2, 3, 32 * bits), dtype=torch.uint8)
    assert torch.equal(pack(unpack(packed, bits), bits), packed)


@pytest.mark.parametrize("group", [8, 16])
def test_a_word_is_rows_eight_apart_of_two_columns(group):
    height = 4 * group
    w = torch.arange(2 * height * 20.0).view(2 * height, 20)
    strips = to_strips(w, group)
    assert torch.equal(from_strips(strips), w)
    tile, g, j = 1, 3, 4
    expected = [w[height * tile + 8 * i + g, 2 * j + e] for i in range(group // 2) for e in range(2)]
    assert strips[tile, j, g].tolist() == expected


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
    height = 4 * codec.group
    for row, col in ((0, 0), (9, 3), (33, 64), (69, 129), (42, 77)):
        tile = packed[row // height, col // 64].tolist()
        i, g, slot = row % height // 8, row % 8, col % 16 // 2
        words = []
        for lane in (h * 4 + col % 64 // 16 for h in range(8)):
            payload = [b for at, size in pieces for b in tile[at * 32 + lane * size : at * 32 + (lane + 1) * size]]
            word = int.from_bytes(bytes(payload), "little") >> slot * bits & (1 << bits) - 1
            words.append(word - 2**64 if word >= 2**63 else word)
        assert matrix[row, col] == codec.decode(torch.tensor([words]))[0, g, 2 * i + col % 2]


def test_grid_covers_ragged_sizes():
    assert tile_grid(1, 1, 8) == tile_grid(1, 1, 16) == (1, 1)
    assert tile_grid(32, 64, 8) == tile_grid(64, 64, 16) == (1, 1)
    assert tile_grid(33, 65, 8) == tile_grid(65, 65, 16) == (2, 2)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 100), st.integers(0, 2**32))
def test_signs_survive_packing(n, seed):
    signs = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    packed = pack_signs(signs)
    assert packed.numel() == -(-n // 8)
    assert torch.equal(unpack_signs(packed, n), signs)
