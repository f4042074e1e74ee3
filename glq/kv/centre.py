"""What the keys of a sequence have in common: their mean before the rotary embedding, turned as each key is turned.

A rotary embedding turns pairs of a key's channels with its position. Before it, three quarters of keys' energy is the
same in every token; after it half, and a mean of some first keys says less and less of those to come. Positions are
counted from a sequence's first column, padding included: its keys are then turned back too little or too far, all by
the same angles, which the mean holds.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


@dataclass(frozen=True)
class Centre:
    """Of each sequence and head. Where `turned` is false the mean is that of the keys as they are."""

    mean: Tensor  # [batch, heads, 1, head_dim], in the keys' dtype
    turned: Tensor  # [batch, 1, 1, 1] bool
    frequencies: Tensor  # [pairs] fp32

    @classmethod
    def of(cls, keys: Tensor, frequencies: Tensor, dtype: torch.dtype) -> "Centre":
        """keys [batch, heads, tokens, head_dim] fp32, a sequence's first ones, finite. frequencies: `rotary_pairs`.

        A sequence's keys are turned back where that leaves less of them: not in a layer without a rotary embedding, nor
        where a model has other pairs than the frequencies are for.
        """
        if 2 * len(frequencies) > keys.shape[-1]:
            frequencies = frequencies[:0]
        frequencies = frequencies.to(keys.device)
        back = _turn(keys, -_angles(frequencies, 0, keys.shape[-2]))
        means = [x.mean(-2, keepdim=True) for x in (keys, back)]
        plain, turned = (mean.square().sum((1, 2, 3), keepdim=True) for mean in means)
        mean = torch.where(turned > plain, means[1], means[0]).to(dtype)
        return cls(mean, turned > plain, frequencies)

    def at(self, start: int, tokens: int) -> Tensor:
        """[batch, heads, tokens, head_dim] fp32: what is subtracted from the keys at positions start, start + 1, …"""
        mean = self.mean.float().expand(-1, -1, tokens, -1)
        return torch.where(self.turned, _turn(mean, _angles(self.frequencies, start, tokens)), mean)

    def map(self, f: Callable[[Tensor], Tensor]) -> "Centre":
        """With f, which chooses among sequences, done to what each of them has."""
        return replace(self, mean=f(self.mean), turned=f(self.turned))

    @property
    def nbytes(self) -> int:
        return self.mean.nbytes + self.turned.nbytes


def rotary_pairs(config: PreTrainedConfig, layer: int) -> Tensor:
    """[pairs] fp32: radians a token that channels i and i + pairs of a head are turned by. Empty if none is known."""
    config = config.get_text_config(decoder=True)
    rope, kind = getattr(config, "rope_parameters", None) or {}, None
    if "rope_type" not in rope and getattr(config, "layer_types", None):
        kind = config.layer_types[layer]
        rope = rope.get(kind) or {}
    name = rope.get("rope_type")
    if name in ROPE_INIT_FUNCTIONS:
        return ROPE_INIT_FUNCTIONS[name](config, layer_type=kind)[0].float()
    if name != "default" or "rope_theta" not in rope:
        return torch.empty(0)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turned = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    return 1.0 / rope["rope_theta"] ** (torch.arange(0, turned, 2).float() / turned)


def _angles(frequencies: Tensor, start: int, tokens: int) -> Tensor:
    """[tokens, pairs] fp32, as models have them."""
    return torch.arange(start, start + tokens, device=frequencies.device).float()[:, None] * frequencies


def _turn(x: Tensor, angles: Tensor) -> Tensor:
    """x [..., tokens, head_dim] fp32; the channels beyond all pairs stay."""
    pairs = angles.shape[-1]
    a, b, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
