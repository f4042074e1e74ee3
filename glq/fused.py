"""Layers that read the same input (q/k/v, gate/up), multiplied in one product: fewer, larger kernels.

The codes and scales of such siblings lie side by side in one tensor, of which each layer's buffers are views. The
first that is called computes the outputs of all; each of the others takes its own where it is called with that very
input. A model's code stays as it is, and so do state_dict, dequantize and what is saved.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from glq.codecs import get_codec
from glq.codecs.packing import tile_rows
from glq.ops.matmul import matmul

_MISSES = 8  # times in a row that outputs were left: these layers are not called together after all


class Fusable(nn.Module):
    """A layer with the tensors of a PackedLinear as its buffers, which may have siblings."""

    codes: Tensor
    scale: Tensor
    signs: Tensor
    codec: str
    in_features: int
    out_features: int
    block: int

    siblings: "Siblings | None" = None

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] → x · Wᵀ [..., out] in x's dtype; with siblings, a slice of a product with all their rows."""
        y = None if self.siblings is None else self.siblings.product(self, x)
        if y is None:
            y = matmul(x, self.codes, self.scale, self.signs, self.codec, self.out_features, self.block)
        return y

    # Whatever replaces buffers or what is in them, one layer at a time: siblings are joined again after the last.

    def _apply(self, *args: Any, **kwargs: Any) -> "Fusable":
        super()._apply(*args, **kwargs)
        self._changed()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._changed()

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copies: tensors without those that they share memory with."""
        state = self.__dict__.copy()
        if self.siblings is not None:
            state["_buffers"] = self._buffers | {"codes": self.codes.clone(), "scale": self.scale.clone()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._changed()

    def _changed(self) -> None:
        if self.siblings is not None:
            self.siblings.enter(self)


class Siblings:
    """What layers of equal codec, signs and block share: the tensors of all, and outputs that are still to be taken.

    Nothing but these outputs is kept from a call, and the last of them that is taken drops the input. Layers whose
    buffers were replaced from outside compute for themselves, and so do all in inference mode, where tensors have no
    version that tells whether the input was changed in place; torch.compile cannot ask for it: there, an input must not
    be changed in place between siblings. Each thread gets what it asks for, but threads that run one model at a
    time take each other's places, and soon every layer computes for itself. Siblings called in different CUDA streams
    are not supported.
    """

    def __init__(self, parts: list[Fusable]) -> None:
        self._count = len(parts)
        self._clear()
        for part in parts:
            part.siblings = self
            self.enter(part)

    def _clear(self) -> None:
        self._parts: list[weakref.ref[Fusable]] = []  # weak: a model's memory is free as soon as it is deleted
        self._separate()

    def _separate(self) -> None:
        self._codes: Tensor | None = None  # [row tiles of all, column tiles, tile bytes]
        self._scale: Tensor | None = None  # [rows of all], 0 in the padding of a part's last tile
        self._views: list[tuple[Tensor, Tensor, Tensor]] = []  # each part's codes, scale and signs
        self._rows: list[slice] = []
        self._waiting: tuple[Tensor, int, dict[int, Tensor]] | None = None  # input, its version, outputs not yet taken
        self._missed = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"_count": self._count}  # restored layers enter one after the other

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._count = state["_count"]
        self._clear()

    def enter(self, part: Fusable) -> None:
        """Take in a part that is new, or whose tensors are; join all parts if they can be."""
        if "_count" not in self.__dict__:
            return  # being restored: it comes after the parts that it was reached from
        self._parts = [ref for ref in self._parts if ref() is not None]
        if len(self._parts) < self._count and all(ref() is not part for ref in self._parts):
            self._parts.append(weakref.ref(part))
        parts = [p for ref in self._parts if (p := ref()) is not None]
        if len(parts) < self._count or not _alike(parts):
            self._separate()
        elif any(self._place(p) is None for p in parts):
            self._join(parts)

    def _join(self, parts: list[Fusable]) -> None:
        self._separate()
        height = tile_rows(get_codec(parts[0].codec).group)
        self._codes = torch.cat([p.codes for p in parts])
        self._scale = torch.cat([pad(p.scale, (0, len(p.codes) * height - p.out_features)) for p in parts])
        tile = 0
        for p in parts:
            tiles, row = len(p.codes), tile * height
            self._rows.append(slice(row, row + p.out_features))
            p.codes, p.scale = self._codes[tile : tile + tiles], self._scale[self._rows[-1]]
            self._views.append((p.codes, p.scale, p.signs))
            tile += tiles

    def _place(self, part: Fusable) -> int | None:
        """Which one it is; None if its buffers are no longer those that were joined."""
        for i, (codes, scale, signs) in enumerate(self._views):
            if part.codes is codes and part.scale is scale and part.signs is signs:
                return i
        return None

    def product(self, part: Fusable, x: Tensor) -> Tensor | None:
        """x [..., in] → the part's output [..., out], computed now or before; None: it has to do it for itself."""
        place, version = self._place(part), _version(x)
        if place is None or version is None:
            return None
        waiting = self._waiting
        if waiting is not None and waiting[0] is x and waiting[1] == version and place in waiting[2]:
            y = waiting[2].pop(place)
            if not waiting[2]:
                self._waiting, self._missed = None, 0
            return y
        if waiting is not None:
            self._waiting = None
            self._missed += 1
            if self._missed == _MISSES:
                self._separate()
                return None
        return self._compute(part, place, x, version)

    def _compute(self, part: Fusable, place: int, x: Tensor, version: int) -> Tensor:
        assert self._codes is not None
        assert self._scale is not None
        y = matmul(x, self._codes, self._scale, part.signs, part.codec, self._scale.shape[0], part.block)
        outputs = {i: y[..., rows] for i, rows in enumerate(self._rows)}
        own = outputs.pop(place)
        self._waiting = (x, version, outputs)
        return own


def fuse(model: nn.Module) -> None:
    """Join the layers of each module that have the same codec, block and signs: glq gives them to one input."""
    groups: dict[tuple[Any, ...], list[Fusable]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Fusable) and not layer.codes.is_meta:
            signs = layer.signs.cpu().numpy().tobytes()
            key = (name.rpartition(".")[0], layer.codec, layer.block, layer.in_features, layer.codes.device, signs)
            groups.setdefault(key, []).append(layer)
    for layers in groups.values():
        if len(layers) > 1:
            Siblings(layers)


def _alike(parts: list[Fusable]) -> bool:
    """Whether parts lie where they can be joined."""
    kinds = {(p.codes.device, p.scale.device, p.signs.device, p.scale.dtype) for p in parts}
    if len(kinds) > 1 or any(p.codes.is_meta for p in parts):
        return False
    return all(torch.equal(p.signs, parts[0].signs) for p in parts)


def _version(x: Tensor) -> int | None:
    """How often x was changed in place; None if that cannot be known."""
    if torch.compiler.is_compiling():
        return 0
    return None if x.is_inference() else x._version
