"""QuantExperts: the experts of a layer, their weights packed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from glq.codecs import get_codec
from glq.codecs.packing import tile_rows
from glq.config import ModuleConfig
from glq.errors import GlqError
from glq.experts import INNER, Experts, part_names
from glq.ops.experts import experts_matmul
from glq.packed import PACKED_DTYPES, PackedExperts, packed_shapes


class ExpertsPart(nn.Module):
    """One matrix of each expert: buffers codes, scale and signs as a linear layer has them, stacked."""

    codes: Tensor
    scale: Tensor
    signs: Tensor

    def __init__(self, module: ModuleConfig) -> None:
        super().__init__()
        self.codec, self.block = module.codec, module.block
        self.in_features, self.out_features, self.count = module.in_features, module.out_features, module.experts or 1
        for name, shape in packed_shapes(module.codec, module.out_features, module.in_features).items():
            self.register_buffer(name, torch.zeros(self.count, *shape, dtype=PACKED_DTYPES[name]))

    @property
    def packed(self) -> PackedExperts:
        sizes = (self.codec, self.out_features, self.in_features, self.block)
        return PackedExperts(*sizes, self.codes, self.scale, self.signs[0])

    def check(self, name: str) -> None:
        """GlqError for scales that are broken, or experts with signs of their own."""
        if not torch.isfinite(self.scale).all():
            raise GlqError(f"{name}: scales are NaN or infinite: the file is damaged, get it again")
        if not torch.equal(self.signs, self.signs[:1].expand_as(self.signs)):
            raise GlqError(f"{name}: its experts have different signs: the file is damaged, get it again")

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[experts, out, in] in the model's own basis."""
        return torch.stack([self.packed[expert].dequantize().to(dtype) for expert in range(self.count)])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Tensors of their own, where the buffers are views of joined ones."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= {f"{prefix}{name}": buffer.contiguous() for name, buffer in self.named_buffers()}

    def extra_repr(self) -> str:
        return f"{self.count} × [{self.out_features}, {self.in_features}], codec={self.codec!r}"


class QuantExperts(Experts):
    """Experts whose weights stay packed, their matrices by name: gate_proj, up_proj and down_proj.

    Once they are loaded, `join` lays those that read the same input side by side, for one product.
    """

    def __init__(self, original: Any, modules: dict[str, ModuleConfig]) -> None:
        super().__init__(original)
        for name, module in modules.items():
            self.add_module(name, ExpertsPart(module))
        self._joint: PackedExperts | None = None

    @property
    def parts(self) -> tuple[ExpertsPart, ...]:
        """The matrices that multiply what the layer reads."""
        return tuple(getattr(self, name) for name in part_names(self.outer_name, self.concatenated))

    def join(self) -> None:
        """Give the codes and scales of one product one tensor each, of which the parts' buffers become views."""
        self._joint = None
        if any(part.codes.is_meta for part in self.parts) or not _alike(self.parts):
            return
        height = tile_rows(get_codec(self.parts[0].codec).group)
        tiles = [part.codes.shape[1] for part in self.parts]
        codes = torch.cat([part.codes for part in self.parts], 1)
        scale = torch.cat(
            [pad(p.scale, (0, n * height - p.out_features)) for p, n in zip(self.parts, tiles, strict=True)], 1
        )
        tile = 0
        for part, n in zip(self.parts, tiles, strict=True):
            part.codes = codes[:, tile : tile + n]
            part.scale = scale[:, tile * height : tile * height + part.out_features]
            tile += n
        first = self.parts[0]
        self._joint = PackedExperts(
            first.codec, scale.shape[1], first.in_features, first.block, codes, scale, first.signs[0]
        )

    def outer(self, x: Tensor, experts: Tensor) -> Tensor:
        joint, parts = self._joint, self.parts
        if joint is None:
            return torch.cat([multiply(x, part.packed, experts, of_pairs=False) for part in parts], 1)
        y = multiply(x, joint, experts, of_pairs=False)
        if joint.out_features == sum(part.out_features for part in parts):
            return y
        each = y.split([joint.out_features // len(parts)] * len(parts), 1)  # with the rows that fill the last tile
        return torch.cat([rows[:, : part.out_features] for rows, part in zip(each, parts, strict=True)], 1)

    def inner(self, x: Tensor, experts: Tensor) -> Tensor:
        return multiply(x, getattr(self, INNER).packed, experts, of_pairs=True)

    def dequantize(self, dtype: torch.dtype) -> nn.Module:
        """The module this one stands for, its weights in `dtype`."""
        outer = torch.cat([part.dequantize(dtype) for part in self.parts], 1)
        return self.restored(outer, getattr(self, INNER).dequantize(dtype))

    # Whatever replaces buffers or what is in them ends with joining them again.

    def _apply(self, *args: Any, **kwargs: Any) -> "QuantExperts":
        super()._apply(*args, **kwargs)
        self.join()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_joint": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.join()


def multiply(x: Tensor, weights: PackedExperts, experts: Tensor, of_pairs: bool) -> Tensor:
    """x [tokens, in], or [tokens · k, in] where of_pairs, experts [tokens, k] → [tokens · k, out]."""
    w, each = weights, 1 if of_pairs else experts.shape[1]
    return experts_matmul(x, w.codes, w.scale, w.signs, experts.flatten(), each, w.codec, w.out_features, w.block)


def _alike(parts: Sequence[ExpertsPart]) -> bool:
    """Whether parts can be joined."""
    kinds = {(p.codec, p.block, p.codes.shape, p.codes.device, p.scale.dtype) for p in parts}
    return len(kinds) == 1 and all(torch.equal(p.signs[0], parts[0].signs[0]) for p in parts)
