"""Tables of upstream's lattice codebooks, built from their description or read from the checkpoint's own file.

Every entry is exact in fp16. The order of the two large tables is that of an unstable sort, which is done again here.
"""

import math
import zipfile
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glq.errors import GlqError

FILE = "e8_codebook.pt"
ROWS = 65536
_NORM = 12  # largest squared norm of the lattice vectors that are sorted
_ROW_BYTES = 32  # 8 values in fp32
_SMALL = 16  # ranges that the introsort leaves to insertion
_MASKS = bytes.fromhex("f1f2f4f837576797a7c73b5b6b9babcb3d5d6d9dadce3e5e6e9eaeec73")  # e8p's vectors of squared norm 12
_SIGN_BITS = (0, 4, 1, 5, 2, 6, 3, 7)  # of e8p: which bit is the sign of a coordinate

Vectors = NDArray[np.float64]


class Table:
    """Values by code, [codes, values] fp16, the same tensor for every layer on a device."""

    def __init__(self, rows: Tensor) -> None:
        self._on = {torch.device("cpu"): rows.half()}

    def __len__(self) -> int:
        return len(self._on[torch.device("cpu")])

    def on(self, device: torch.device) -> Tensor:
        if device not in self._on:
            self._on[device] = self._on[torch.device("cpu")].to(device)
        return self._on[device]


@cache
def shell_table() -> Table:
    """65,536 vectors of E8, by their norms."""
    vectors = np.concatenate([_ball(range(-3, 4), _NORM, even=True), _ball(_halves(3), _NORM, even=True)])
    z = _e8_coordinates(vectors)
    return _first_by_norm(vectors[np.lexsort(z.T)])  # z₇ counts most


@cache
def relaxed_table() -> Table:
    """65,536 vectors of Z⁸ ∪ (Z⁸ + ½), by their norms."""
    parts = [_ball(range(-3, 4), _NORM), _ball(_halves(3), _NORM)]
    return _first_by_norm(np.concatenate([part[np.lexsort(part.T)] for part in parts]))


@cache
def e8p_table() -> Table:
    """QuIP#'s E8P: a row of absolute values, signs of which one follows from the others, and a shift by ¼."""
    sizes = _e8p_sizes()
    code = np.arange(ROWS)
    signs = code & 255
    odd = _parity(signs)
    flips = signs ^ odd
    negative = np.stack([flips >> bit & 1 for bit in _SIGN_BITS], 1)
    negative[:, 7] ^= (sizes.sum(1).astype(int) & 1)[code >> 8]
    values = sizes[code >> 8] * (1 - 2 * negative) + np.where(odd == 1, -0.25, 0.25)[:, None]
    return Table(torch.from_numpy(values))


@cache
def e81b_table() -> Table:
    """256 vectors for a stage of one bit: E8 up to squared norm 2, and 15 along the axes."""
    near = [part[np.lexsort(part.T[::-1])] for part in (_ball(range(-1, 2), 2, True), _ball(_halves(1), 2, True))]
    axes = 2.0 * np.concatenate([np.eye(8), -np.eye(8)[:7]])
    return Table(torch.from_numpy(np.concatenate([*near, axes]) + 0.0))  # no negative zeros


def read_table(file: Path) -> Table:
    """The table of a checkpoint's own e8_codebook.pt, as a zip with one raw tensor: its pickle is not looked at.

    GlqError for any other content.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [e for e in archive.infolist() if e.filename.rpartition("/")[0].endswith("/data")]
            orders = [archive.open(e).read(8) for e in archive.infolist() if e.filename.endswith("/byteorder")]
            if len(entries) != 1 or not entries[0].filename.endswith("/data/0"):
                raise GlqError(f"{file} should hold one tensor, the codebook, found {len(entries)}: do not trust it")
            (entry,) = entries
            rows, rest = divmod(entry.file_size, _ROW_BYTES)
            if rest or not 1 <= rows <= ROWS or entry.compress_type != zipfile.ZIP_STORED:
                raise GlqError(
                    f"{file} should hold a table of 8 fp32 a row, {ROWS:,} rows at most, uncompressed, found "
                    f"{entry.file_size:,} bytes: get it again, or delete it to have the usual table"
                )
            content = archive.read(entry)
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, GlqError):
            raise
        raise GlqError(f"{file} is damaged ({error}): get it again, or delete it to have the usual table") from error
    if any(order.strip() != b"little" for order in orders):
        raise GlqError(f"{file} has another byte order than little-endian: get it again, or delete it")
    table = torch.frombuffer(bytearray(content), dtype=torch.float32).view(rows, 8)
    if not torch.equal(table.half().float(), table):
        raise GlqError(f"{file} holds values that no codebook has: get it again, or delete it to have the usual table")
    return Table(table)


def _halves(count: int) -> list[float]:
    return [i + 0.5 for i in range(-count, count)]


def _ball(values: "range | list[float]", norm: float, even: bool = False) -> Vectors:
    """All vectors of 8 such values up to a squared norm, one a row; even: those with an even sum."""
    steps = np.array(list(values), dtype=np.float64)
    found = np.zeros((1, 0))
    for _ in range(8):
        found = np.concatenate([np.repeat(found, len(steps), 0), np.tile(steps, len(found))[:, None]], 1)
        found = found[(found**2).sum(1) <= norm]
    return found[found.sum(1) % 2 == 0] if even else found


def _e8_coordinates(v: Vectors) -> NDArray[np.int64]:
    """z of v = Σ zᵢ bᵢ, with b₀ = 2e₀, bᵢ = eᵢ − eᵢ₋₁ and b₇ = (½)⁸."""
    z = np.zeros_like(v)
    z[:, 7] = 2 * v[:, 7]
    rest = v - v[:, 7:]
    z[:, 6] = rest[:, 6]
    for i in range(5, 0, -1):
        z[:, i] = rest[:, i] + z[:, i + 1]
    z[:, 0] = (rest[:, 0] + z[:, 1]) / 2
    return np.rint(z).astype(np.int64)


def _first_by_norm(vectors: Vectors) -> Table:
    keys = (4 * (vectors**2).sum(1)).astype(np.int64).tolist()
    order = introsorted(keys)[:ROWS]
    return Table(torch.from_numpy(vectors[order] + 0.0))


def introsorted(keys: list[int]) -> NDArray[np.int64]:
    """The order in which GNU's std::sort leaves (key, position) when it compares keys alone.

    Quicksort down to ranges of 16 with the median of three for a pivot, then one insertion sort, which is stable.
    """
    a, place = list(keys), list(range(len(keys)))
    work = [(0, len(a))]
    while work:
        first, last = work.pop()
        while last - first > _SMALL:
            pivot = _median(a, first + 1, first + (last - first) // 2, last - 1)
            a[first], a[pivot] = a[pivot], a[first]
            place[first], place[pivot] = place[pivot], place[first]
            cut = _partition(a, place, first, last)
            work.append((cut, last))
            last = cut
    moved = np.array(place, dtype=np.int64)
    return moved[np.argsort(np.array(a), kind="stable")]


def _median(a: list[int], i: int, j: int, k: int) -> int:
    if a[i] < a[j]:
        return j if a[j] < a[k] else k if a[i] < a[k] else i
    return i if a[i] < a[k] else k if a[j] < a[k] else j


def _partition(a: list[int], place: list[int], first: int, last: int) -> int:
    """Where the range is cut, after elements on the wrong side of a[first] have changed places."""
    pivot, i, j = a[first], first + 1, last
    while True:
        while a[i] < pivot:
            i += 1
        j -= 1
        while pivot < a[j]:
            j -= 1
        if i >= j:
            return i
        a[i], a[j] = a[j], a[i]
        place[i], place[j] = place[j], place[i]
        i += 1


def _e8p_sizes() -> Vectors:
    """The 256 × 8 absolute values of E8P."""
    near = np.array([v for v in product((0.5, 1.5, 2.5), repeat=8) if math.fsum(x * x for x in v) <= 10])
    far = np.array([[1.5 if mask >> i & 1 else 0.5 for i in range(8)] for mask in _MASKS])
    return np.concatenate([near, far])


def _parity(bits: NDArray[np.int64]) -> NDArray[np.int64]:
    for shift in (4, 2, 1):
        bits = bits ^ bits >> shift
    return bits & 1
