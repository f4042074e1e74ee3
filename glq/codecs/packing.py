"""The tile layout: codes as bytes in the order in which a warp of a kernel streams them (docs/FORMAT.md).

A code word stands for `group` weights, 8 or 16: two columns and the rows g, g + 8, g + 16, … of a tile. A tile is
4 · group rows × 64 columns, of which lane (g, t) of a warp (g = 0..7, t = 0..3) holds the rows g + 8i and the columns
16t … 16t + 15: eight words, which are the A fragments of four mma.m16n8k16 steps for its row tiles of 16. The eight
words of two columns, one a g, are a strip: what a trellis code makes one stream of.

A lane's eight words are one little-endian string of code_bits bytes, cut into pieces of 16, 8 and 4 bytes, the
largest first; the 32 lanes' pieces lie side by side, so that each load of a warp is contiguous.
"""

import itertools

import torch
from torch import Tensor

TILE_COLS = 64
STRIP = 8  # words of a strip, and of a lane in a tile
_LANES = 32
_GROUP_COLS = 2


def tile_rows(group: int) -> int:
    """Rows of a tile of words of `group` weights."""
    return STRIP * group // _GROUP_COLS


def tile_grid(out_features: int, in_features: int, group: int) -> tuple[int, int]:
    """How many tiles cover [out, in]; the last ones are filled up with zeros before encoding."""
    return -(-out_features // tile_rows(group)), -(-in_features // TILE_COLS)


def tile_bytes(code_bits: int) -> int:
    """Bytes of one tile of codes."""
    return _LANES * code_bits


def to_strips(w: Tensor, group: int) -> Tensor:
    """[tile rows · r, 2 · c] → [r, c, 8, group]: strips of two columns, as 8 words of `group` weights each.

    Row 8·i + g of a tile and column 2·j + e become component 2·i + e of word g of strip j.
    """
    tiles, pairs = w.shape[0] // tile_rows(group), w.shape[1] // _GROUP_COLS
    split = w.reshape(tiles, group // _GROUP_COLS, STRIP, pairs, _GROUP_COLS)
    return split.permute(0, 3, 2, 1, 4).reshape(tiles, pairs, STRIP, group)


def from_strips(strips: Tensor) -> Tensor:
    """Inverse of `to_strips`: [r, c, 8, group] → [tile rows · r, 2 · c]."""
    tiles, pairs, _, group = strips.shape
    split = strips.reshape(tiles, pairs, STRIP, group // _GROUP_COLS, _GROUP_COLS)
    return split.permute(0, 3, 2, 1, 4).reshape(tiles * tile_rows(group), pairs * _GROUP_COLS)


def pack(codes: Tensor, code_bits: int) -> Tensor:
    """codes [row tiles, in / 2, 8] int64, of a multiple of 4 bits → [row tiles, column tiles, 32 · code_bits] uint8."""
    row_tiles, pairs, _ = codes.shape
    col_tiles = pairs * _GROUP_COLS // TILE_COLS
    lanes = codes.view(row_tiles, col_tiles, 4, STRIP, STRIP).permute(0, 1, 4, 2, 3).reshape(-1, _LANES, STRIP)
    nibbles = torch.stack([(lanes >> at & 15).to(torch.uint8) for at in range(0, code_bits, 4)], 3).flatten(2)
    payload = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    parts = [payload[:, :, a:b].flatten(1) for a, b in _pieces(code_bits)]
    return torch.cat(parts, 1).view(row_tiles, col_tiles, tile_bytes(code_bits))


def unpack(packed: Tensor, code_bits: int) -> Tensor:
    """Inverse of `pack`: [row tiles, column tiles, 32 · code_bits] uint8 → codes [row tiles, in / 2, 8] int64."""
    row_tiles, col_tiles, _ = packed.shape
    flat = packed.reshape(-1, tile_bytes(code_bits))
    payload = torch.cat([flat[:, a * _LANES : b * _LANES].view(-1, _LANES, b - a) for a, b in _pieces(code_bits)], 2)
    nibbles = torch.stack([payload & 15, payload >> 4], 3).view(-1, STRIP, code_bits // 4)
    words = nibbles[..., 0].long()
    for i in range(1, code_bits // 4):
        words |= nibbles[..., i].long() << 4 * i
    lanes = words.view(row_tiles, col_tiles, STRIP, 4, STRIP)
    return lanes.permute(0, 1, 3, 4, 2).reshape(row_tiles, -1, STRIP)


def _pieces(code_bits: int) -> list[tuple[int, int]]:
    """Cuts of a lane's code_bits bytes into pieces of 16, 8 and 4 bytes."""
    cuts = [0]
    for size in (16, 8, 4):
        while code_bits - cuts[-1] >= size:
            cuts.append(cuts[-1] + size)
    if cuts[-1] != code_bits:
        raise ValueError(f"codes of {code_bits} bits do not fill words of 4 bytes in groups of eight")
    return list(itertools.pairwise(cuts))
