"""What the first keys of a sequence tell of all: their mean before the rotary embedding, turned as each key is turned.

A rotary embedding turns pairs of a key's channels with its position. Before it, three quarters of keys' energy is the
same in every token; after it half, and a mean of some first keys says less and less of those to come. Positions are
counted from a sequence's first column, padding included: its keys are then turned back too little or too far, all by
the same angles, which the mean holds.

The first token of many texts is read by all others, and its key is short: an error as long as the centre's would be in
every weight. So a key that is shorter than its distance to the centre stands alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_PRIOR = 32  # keys that an energy expected of channels counts for: a few first ones tell too little of 256


@dataclass(frozen=True)
class Centre:
    """Of each sequence and head. Where `turned` is false the mean is that of the keys as they are.

    factors: what is left of keys is multiplied by them before it is rounded, as by those of glq.kv.channels.
    """

    mean: Tensor  # [batch, heads, 1, head_dim], in the keys' dtype
    factors: Tensor  # the same, or [batch, 1, 1, 1]
    turned: Tensor  # [batch, 1, 1, 1] bool
    frequencies: Tensor  # [pairs] fp32

    @classmethod
    def of(cls, keys: Tensor, frequencies: Tensor, expected: Tensor | None, dtype: torch.dtype) -> "Centre":
        """keys [batch, heads, tokens, head_dim] fp32, a sequence's first ones, finite. frequencies: `rotary_pairs`.

        A sequence's keys are turned back where that leaves less of them: not in a layer without a rotary embedding, nor
        where a model has other pairs than the frequencies are for. expected [head_dim]: the energy of channels for
        which factors of 1 are right, its mean 1; None where nothing is known of queries.
        """
        if 2 * len(frequencies) > keys.shape[-1]:
            frequencies = frequencies[:0]
        frequencies = frequencies.to(keys.device)
        back = _turn(keys, -_angles(frequencies, 0, keys.shape[-2]))
        means = [x.mean(-2, keepdim=True) for x in (keys, back)]
        plain, turned = (mean.square().sum((1, 2, 3), keepdim=True) for mean in means)
        mean = torch.where(turned > plain, means[1], means[0]).to(dtype)
        none = cls(mean, torch.ones_like(mean[:, :1, :, :1]), turned > plain, frequencies)
        return none if expected is None else none._with_factors(keys, expected)

    def _with_factors(self, keys: Tensor, expected: Tensor) -> "Centre":
        left, _ = self.subtract(keys, 0)
        energy = mean_of_pairs(left.square().mean(-2, keepdim=True), len(self.frequencies))
        energy = energy / energy.mean(-1, keepdim=True).clamp_min(1e-20)
        tokens = keys.shape[-2]
        found = (tokens * energy + _PRIOR * expected) / (tokens + _PRIOR)
        return replace(self, factors=((expected / found) ** 0.25).to(self.mean.dtype))

    def subtract(self, keys: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """keys [batch, heads, tokens, head_dim] fp32 at positions start, start + 1, … → what is rounded, and whether a
        key stands alone, [batch, heads, tokens].
        """
        rest = keys - self._at(start, keys.shape[-2])
        alone = keys.square().sum(-1) < rest.square().sum(-1)
        return torch.where(alone[..., None], keys, rest) * self.factors.float(), alone

    def add(self, rounded: Tensor, alone: Tensor, start: int) -> Tensor:
        """The inverse of `subtract`."""
        left = rounded / self.factors.float()
        return torch.where(alone[..., None], left, left + self._at(start, rounded.shape[-2]))

    def _at(self, start: int, tokens: int) -> Tensor:
        """[batch, heads, tokens, head_dim] fp32."""
        mean = self.mean.float().expand(-1, -1, tokens, -1)
        return torch.where(self.turned, _turn(mean, _angles(self.frequencies, start, tokens)), mean)

    def map(self, f: Callable[[Tensor], Tensor]) -> "Centre":
        """With f, which chooses among sequences, done to what each of them has."""
        return replace(self, mean=f(self.mean), factors=f(self.factors), turned=f(self.turned))

    @property
    def nbytes(self) -> int:
        return self.mean.nbytes + self.factors.nbytes + self.turned.nbytes


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


def mean_of_pairs(energy: Tensor, pairs: int) -> Tensor:
    """energy [..., head_dim], with the mean of a pair's two channels in both: a rotary embedding mixes them."""
    a, b, rest = energy.split([pairs, pairs, energy.shape[-1] - 2 * pairs], -1)
    both = (a + b) / 2
    return torch.cat([both, both, rest], -1)


def _angles(frequencies: Tensor, start: int, tokens: int) -> Tensor:
    """[tokens, pairs] fp32, as models have them."""
    return torch.arange(start, start + tokens, device=frequencies.device).float()[:, None] * frequencies


def _turn(x: Tensor, angles: Tensor) -> Tensor:
    """x [..., tokens, head_dim] fp32; the channels beyond all pairs stay."""
    pairs = angles.shape[-1]
    a, b, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
