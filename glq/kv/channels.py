"""What keys are multiplied by, channel by channel, before they are rounded, and divided by again afterwards.

Rounding makes an error of the same size in all channels of a head vector, and queries are not of one size in all. Where
a model normalizes queries and keys of a head, its own weights tell both sizes: Gemma 3 has channels of keys that are
twenty times the others, and meet small queries.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from glq.kv.centre import mean_of_pairs, rotary_pairs

_LEAST = 0.1  # of the root mean square: channels that a norm makes 0 shall not have a factor of 0 or infinity


@dataclass(frozen=True)
class KeyChannels:
    """factors [head_dim] fp32, 1 at most. energy [head_dim]: of keys times these, so far as is known; its mean is 1."""

    factors: Tensor
    energy: Tensor


@torch.no_grad()
def key_channels(model: PreTrainedModel) -> dict[int, KeyChannels]:
    """By layer, for those with a `q_norm` and a `k_norm` over the channels of a head.

    The error of products is least with the square root of queries' size over keys', if normalized queries and keys have
    no channel that is larger than others. A rotary pair has one factor: the embedding mixes its channels.
    """
    found = {}
    for module in model.get_decoder().modules():
        layer, queries, keys = (getattr(module, name, None) for name in ("layer_idx", "q_norm", "k_norm"))
        if layer is not None and all(_is_of_heads(norm, getattr(module, "head_dim", None)) for norm in (queries, keys)):
            pairs = len(rotary_pairs(model.config, layer))
            q, k = (_energy(norm, pairs) for norm in (queries, keys))
            factors, energy = (q / k) ** 0.25, (q * k).sqrt()
            factors, energy = factors / factors.max(), energy / energy.mean()
            if factors.isfinite().all():
                found[layer] = KeyChannels(factors, energy)
    return found


def _is_of_heads(norm: Any, head_dim: int | None) -> bool:
    weight = getattr(norm, "weight", None)
    return isinstance(weight, Tensor) and weight.shape == (head_dim,) and not weight.is_meta


def _energy(norm: Any, pairs: int) -> Tensor:
    """[head_dim]: what a norm makes of channels of energy 1, the mean of a pair's two, and not too little of any."""
    x = torch.ones_like(norm.weight, dtype=torch.float32)
    x[1::2] = -1  # a mean of 0, for norms that subtract it
    energy = mean_of_pairs(norm(x).float().square(), pairs if 2 * pairs <= len(x) else 0)
    return energy.clamp_min(_LEAST**2 * energy.mean())
