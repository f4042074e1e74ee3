"""Upstream's trellis codes: what a state of 16 bits stands for, and the order of a tile's values."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from glq.upstream.codebooks import Table

TILE = 16  # rows, and columns; each tile is a cyclic code of its own
VALUES = {"3inst": 1, "hyb": 2}  # of one step
_PIECES = 32  # of a tile's stream, of K bytes each


@cache
def computed_table() -> Table:
    """3inst: two halves of a linear congruence of the state, as fp16, added and rounded once. [65536, 1]"""
    state = np.arange(65536, dtype=np.uint64)
    h = (state * 89226354 + 64248484).astype(np.uint32)
    r = (h & np.uint32(0x8FFF8FFF)) ^ np.uint32(0x3B603B60)
    upper, lower = ((part.astype(np.uint16)).view(np.float16).astype(np.float32) for part in (r >> 16, r & 0xFFFF))
    return Table(torch.from_numpy((upper + lower).astype(np.float16))[:, None])


def hybrid_table(tlut: Tensor) -> Tensor:
    """hyb: two values of a layer's own table [512, 2] by a hash of the state, one with a sign. [65536, 2] fp16"""
    state = torch.arange(65536, device=tlut.device)
    h = state * (state + 1)
    pairs = tlut[h >> 6 & 511].half()
    return torch.stack([torch.where((h >> 15 & 1).bool(), -pairs[:, 0], pairs[:, 0]), pairs[:, 1]], 1)


def states(packed: Tensor, rows: int, columns: int, values: int) -> Tensor:
    """packed [(rows / 16)(columns / 16), 16 K] int16 → the states of each tile, [tiles, 256 / values] int32.

    Tiles lie row by row. A state is 16 bits of the tile's stream, which is cyclic, K · values further on at each step.
    """
    k = packed.shape[1] // TILE
    stream = _streams(packed, rows, columns, k)
    start = torch.arange(256 // values, device=packed.device) * (k * values)
    wide = torch.cat([stream, stream[:, :2]], 1).to(torch.int32)
    byte, bit = start // 8, start % 8
    window = wide[:, byte] << 16 | wide[:, byte + 1] << 8 | wide[:, byte + 2]
    return window >> (8 - bit) & 0xFFFF


def _streams(packed: Tensor, rows: int, columns: int, k: int) -> Tensor:
    """The bits of each tile in order, [tiles, 32 K] uint8, first bits first: stored are four tiles piece by piece."""
    pieces = packed.contiguous().view(torch.uint8).view(rows // 32, columns // 32, _PIECES, 2, 2, k)
    return pieces.flip(-1).permute(0, 4, 1, 3, 2, 5).reshape(rows * columns // TILE**2, _PIECES * k)


def untiled(steps: Tensor, rows: int, columns: int) -> Tensor:
    """The values of each tile's steps, [tiles, 256 / values, values] → [rows, columns].

    In a tile, value p = 32·i₁ + 8·i₃ + 4·i₂ + 2·i₀ + i₄ lies in row 8·i₀ + i₁, column 8·i₂ + 2·i₃ + i₄.
    """
    tiles = steps.reshape(rows // TILE, columns // TILE, 8, 4, 2, 2, 2)  # a, b, i₁, i₃, i₂, i₀, i₄
    return tiles.permute(0, 5, 2, 1, 4, 3, 6).reshape(rows, columns)
