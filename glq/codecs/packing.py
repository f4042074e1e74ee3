"""The tile layout: codes as bytes in the order in which a warp of a kernel streams them (docs/FORMAT.md).

A tile is 32 rows × 64 columns of a weight matrix, of which lane (g, t) of a warp (g = 0..7, t = 0..3) holds rows
g, g+8, g+16, g+24 and columns 16t … 16t+15: eight groups of 4 rows × 2 columns, the A fragments of four
mma.m16n8k16 steps for two row tiles. A lane's eight codes are one little-endian string of code_bits bytes, cut into
pieces of 16, 8 and 4 bytes, the largest first; the 32 lanes' pieces lie side by side, so that each load of a warp
is contiguous.
"""

import itertools

import torch
from torch import Tensor

TILE_ROWS = 32
TILE_COLS = 64
_LANES = 32
_CODES = 8  # of a lane in a tile
_GROUP_ROWS, _GROUP_COLS = 4, 2


def tile_grid(out_features: int, in_features: int) -> tuple[int, int]:
    """How many tiles cover [out, in]; the last ones are filled up with zeros before encoding."""
    return -(-out_features // TILE_ROWS), -(-in_features // TILE_COLS)


def tile_bytes(code_bits: int) -> int:
    """Bytes of one tile of codes."""
    return _LANES * code_bits


def to_groups(w: Tensor) -> Tensor:
    """[32·r, 2·c] → [r · 8 · c, 8]: the groups of 4 rows × 2 columns that are coded together.

    Row r = 32·tile + 8·i + g and column 2·j + e become component 2·i + e of group (tile, g, j).
    """
    tiles, pairs = w.shape[0] // TILE_ROWS, w.shape[1] // _GROUP_COLS
    return w.reshape(tiles, _GROUP_ROWS, 8, pairs, _GROUP_COLS).permute(0, 2, 3, 1, 4).reshape(-1, 8)


def from_groups(groups: Tensor, rows: int) -> Tensor:
    """Inverse of `to_groups`: [n, 8] → [rows, 8·n / rows]."""
    tiles = rows // TILE_ROWS
    return groups.reshape(tiles, 8, -1, _GROUP_ROWS, _GROUP_COLS).permute(0, 3, 1, 2, 4).reshape(rows, -1)


def pack(codes: Tensor, code_bits: int) -> Tensor:
    """codes [row tiles, 8, in / 2] int64, one a group → bytes [row tiles, column tiles, 32 · code_bits] uint8."""
    row_tiles, _, pairs = codes.shape
    col_tiles = pairs * _GROUP_COLS // TILE_COLS
    lanes = codes.view(row_tiles, 8, col_tiles, 4, _CODES).permute(0, 2, 1, 3, 4).reshape(-1, _LANES, _CODES)
    bits = lanes[..., None] >> torch.arange(code_bits, device=codes.device) & 1
    weights = 2 ** torch.arange(8, device=codes.device)
    payload = (bits.view(-1, _LANES, code_bits, 8) * weights).sum(-1).to(torch.uint8)
    parts = [payload[:, :, a:b].flatten(1) for a, b in _pieces(code_bits)]
    return torch.cat(parts, 1).view(row_tiles, col_tiles, tile_bytes(code_bits))


def unpack(packed: Tensor, code_bits: int) -> Tensor:
    """Inverse of `pack`: [row tiles, column tiles, 32 · code_bits] uint8 → codes [row tiles, 8, in / 2] int64."""
    row_tiles, col_tiles, _ = packed.shape
    flat = packed.reshape(-1, tile_bytes(code_bits))
    payload = torch.cat([flat[:, a * _LANES : b * _LANES].view(-1, _LANES, b - a) for a, b in _pieces(code_bits)], 2)
    codes = []
    for i in range(_CODES):
        first, shift = divmod(i * code_bits, 8)
        last = ((i + 1) * code_bits + 7) // 8
        word = torch.zeros_like(payload[..., 0], dtype=torch.int64)
        for k in range(first, last):
            word += payload[..., k].long() << 8 * (k - first)
        codes.append(word >> shift & (1 << code_bits) - 1)
    lanes = torch.stack(codes, -1).view(row_tiles, col_tiles, 8, 4, _CODES)
    return lanes.permute(0, 2, 1, 3, 4).reshape(row_tiles, 8, -1)


def _pieces(code_bits: int) -> list[tuple[int, int]]:
    """Cuts of a lane's code_bits bytes into pieces of 16, 8 and 4 bytes."""
    cuts = [0]
    for size in (16, 8, 4):
        while code_bits - cuts[-1] >= size:
            cuts.append(cuts[-1] + size)
    if cuts[-1] != code_bits:
        raise ValueError(f"codes of {code_bits} bits do not fill words of 4 bytes in groups of eight")
    return list(itertools.pairwise(cuts))
