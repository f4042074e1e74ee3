"""Groups of layers that read the same input: rounded as one matrix, written as they come, accounted for."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from glq.calibration import Moments
from glq.checkpoint import CheckpointWriter
from glq.codecs import Codec, get_codec
from glq.codecs.packing import tile_rows
from glq.config import ModuleConfig
from glq.errors import GlqError
from glq.packed import PackedLinear, pack_codes, pack_signs
from glq.rotation import block_width, random_signs, rotate
from glq.rounding import GraphedPanelRounder, PanelRounder, factor, objective, round_matrix, round_panel, solve

HALF_STEP = 0.5  # of the way from the weights to those that fit the reference's outputs best


@dataclass(frozen=True)
class Stored:
    """A layer that was rounded: its entry in the config, its bytes, the share of its outputs' energy that was lost."""

    module: ModuleConfig
    nbytes: int
    lost: float


class GroupRounder:
    """Rounds one group after the other; `stored` says what was done, by the layers' full names.

    isolated: layers keep their weights, so that each is rounded as if it were alone.
    """

    def __init__(
        self, writer: CheckpointWriter, device: torch.device, seed: int, damping: float, isolated: bool
    ) -> None:
        self.stored: dict[str, Stored] = {}
        self._writer, self._seed, self._damping, self._isolated = writer, seed, damping, isolated
        self._panels: PanelRounder = GraphedPanelRounder() if device.type == "cuda" else round_panel

    def __call__(self, layers: dict[str, nn.Linear], codecs: dict[str, str], moments: Moments) -> None:
        """Round the layers of a group, give them the rounded weights, and write them to the checkpoint."""
        first = next(iter(layers))
        if not torch.isfinite(moments.hessian).all():
            raise GlqError(f"{first} reads NaN or infinite values on the calibration text: the model is broken")
        for codec in dict.fromkeys(codecs.values()):
            chosen = {name: layer for name, layer in layers.items() if codecs[name] == codec}
            seed = _seed(self._seed, first)
            group = list(chosen.values())
            packed, lost = round_layers(group, moments, get_codec(codec), seed, self._damping, self._panels)
            for (name, layer), p in zip(chosen.items(), packed, strict=True):
                if not torch.isfinite(p.scale).all():
                    raise GlqError(f"{name}: its weights are too large for 16-bit scales: the model is broken")
                if not self._isolated:
                    layer.weight.data = p.dequantize()
                self._writer.add({f"{name}.codes": p.codes, f"{name}.scale": p.scale, f"{name}.signs": p.signs})
                module = ModuleConfig(p.codec, p.in_features, p.out_features, p.block)
                self.stored[name] = Stored(module, p.nbytes, lost)


def round_layers(
    layers: list[nn.Linear],
    moments: Moments,
    codec: Codec,
    seed: int,
    damping: float,
    panels: PanelRounder = round_panel,
) -> tuple[list[PackedLinear], float]:
    """Round linear layers that read the same input, as one matrix: them packed, and the share of energy lost."""
    height = tile_rows(codec.group)
    weight = torch.cat([pad(layer.weight.float(), (0, 0, 0, -layer.out_features % height)) for layer in layers])
    block = block_width(weight.shape[1])
    signs = random_signs(weight.shape[1], torch.Generator().manual_seed(seed)).to(weight.device)
    h, drift = (_rotate_both(moment, signs, block) for moment in (moments.hessian, moments.drift))
    target = rotate(weight, signs, block)
    m = factor(h, damping)
    target += HALF_STEP * solve(m, target @ drift)
    rounded = round_matrix(target, h, m, codec, panels)
    scale = rounded.scale.to(torch.float16)
    lost = objective(target, rounded.values * scale.float()[:, None], h).item()
    packed, tile = [], 0
    for layer in layers:
        tiles = -(-layer.out_features // height)
        codes = pack_codes(rounded.codes[tile : tile + tiles], codec.name)
        rows = slice(tile * height, tile * height + layer.out_features)
        shape = (layer.out_features, layer.in_features)
        packed.append(PackedLinear(codec.name, *shape, block, codes, scale[rows].clone(), pack_signs(signs)))
        tile += tiles
    return packed, lost


def _seed(seed: int, name: str) -> int:
    """A seed for each group of layers, independent of the order in which they come."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") % 2**63


def _rotate_both(h: Tensor, signs: Tensor, block: int) -> Tensor:
    """R·h·Rᵀ."""
    return rotate(rotate(h, signs, block).T, signs, block).T.contiguous()
