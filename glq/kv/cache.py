"""`GlqCache`: a transformers Cache whose keys and values are kept as E8 codes of 4, 3 or 2 bits a channel.

A layer keeps one uint8 tensor for its keys and one for its values, [batch, heads, tokens, row]: a row is the code words
of one head vector and the two bytes of its fp16 scale. transformers' dynamic layers append, cut, reorder and repeat
rows as they do 16-bit vectors; `update` encodes what comes and decodes what goes to attention. Every token is rounded
once, as it comes, and never again. What all keys have in common is subtracted first (glq.kv.centre): it makes much of
their length, and their error goes with their length. Channels that queries make little of are made smaller before that
(glq.kv.channels).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from glq.errors import GlqError
from glq.kv.centre import Centre, rotary_pairs
from glq.kv.channels import KeyChannels, key_channels
from glq.kv.codec import KvCodec, kv_codec, narrow

_SCALE_BYTES = 2
_LARGEST = torch.finfo(torch.float16).max  # what is beyond it decodes to NaN, and shall not take others with it
_CENTRED = 16  # keys that a mean is taken of, at least: fewer tell little, and the first token's is unlike all others


@dataclass(frozen=True)
class _Rounding:
    """How a layer's keys and values become codes."""

    keys: KvCodec
    values: KvCodec
    centred: bool
    frequencies: Tensor  # of the rotary embedding, `rotary_pairs`
    channels: KeyChannels | None = None  # of keys, where more than 1 is known of them


class _Coded:
    """Over a dynamic layer: rows of codes where it keeps keys and values, the keys' less the `centre` of each sequence.

    The centre is that of the first keys that come, times their factors, if enough come at once.
    """

    supports_early_init = False  # the layer's tensors are not the shape and type that early initialization would give
    rounding: _Rounding
    centre: Centre | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Encodes the new [batch, heads, tokens, head_dim]; returns what attention sees, decoded, in their dtypes."""
        rounding, tokens, alone = self.rounding, key_states.shape[-2], None
        start = self.get_seq_length()  # type: ignore[attr-defined]
        factors, expected = (1.0, None) if (c := rounding.channels) is None else (c.factors, c.energy)
        scaled = key_states.float() * factors
        if rounding.centred and not self.is_initialized and tokens >= _CENTRED:  # type: ignore[attr-defined]
            sane = torch.where(key_states.abs() <= _LARGEST, scaled, 0)  # NaN is not, either
            self.centre = Centre.of(sane, rounding.frequencies, expected, key_states.dtype)
        if self.centre is not None:
            scaled, alone = self.centre.subtract(scaled, start)
        new = (_rows(rounding.keys, scaled, alone), _rows(rounding.values, value_states))
        key_rows, value_rows = super().update(*new, *args, **kwargs)  # type: ignore[misc]
        keys, alone = _vectors(rounding.keys, key_rows, torch.float32)
        if self.centre is not None:  # what is seen ends with what is new, with a sliding window, too
            keys = self.centre.add(keys, alone, start + tokens - keys.shape[-2])
        values, _ = _vectors(rounding.values, value_rows, value_states.dtype)
        return narrow(keys / factors, key_states.dtype), values

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.centre = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._choose(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._choose(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._choose(lambda x: x[indices])

    def _choose(self, f: Callable[[Tensor], Tensor]) -> None:
        if self.centre is not None:
            self.centre = self.centre.map(f)

    def offload(self) -> None:
        raise GlqError("GlqCache is not offloaded to the CPU: it is for GPU memory, use it without offloading")

    prefetch = offload

    @property
    def nbytes(self) -> int:
        kept = [self.keys, self.values, self.centre] if self.is_initialized else []  # type: ignore[attr-defined]
        return sum(part.nbytes for part in kept if part is not None)


class GlqLayer(_Coded, DynamicLayer):
    """Full attention."""

    def __init__(self, rounding: _Rounding) -> None:
        super().__init__()
        self.rounding = rounding


class GlqSlidingLayer(_Coded, DynamicSlidingWindowLayer):
    """Sliding-window and chunked attention: the window's tokens alone are kept."""

    def __init__(self, rounding: _Rounding, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.rounding = rounding


class GlqCache(Cache):
    """`model.generate(..., past_key_values=GlqCache(bits=4, model=model))`.

    bits: 4, 3 or 2, of keys and values; key_bits and value_bits where they differ. model: with it, layers with a
    sliding window keep that alone, recurrent layers their state, and keys are rounded as its rotary embedding and its
    norms of queries and keys suggest. config: the model's, where that is all there is: without its norms. With neither,
    every layer keeps all. centre: whether the mean of the first keys is subtracted; pages of a server (glq.kv.pages)
    hold what it gives without.
    GlqError for other bits, for a head_dim that is no multiple of 8, and layers that keep more than keys and values.
    """

    def __init__(
        self,
        bits: int = 4,
        *,
        key_bits: int | None = None,
        value_bits: int | None = None,
        model: PreTrainedModel | None = None,
        config: PreTrainedConfig | None = None,
        centre: bool = True,
    ) -> None:
        keys, values = (kv_codec(bits if own is None else own) for own in (key_bits, value_bits))
        rounding = _Rounding(keys, values, centre, torch.empty(0))
        config = config if model is None else model.config
        if config is None:
            super().__init__(layer_class_to_replicate=partial(GlqLayer, rounding))
            return
        channels = {} if model is None else key_channels(model)
        layers = []
        for i, layer in enumerate(DynamicCache(config=config).layers):
            own = replace(rounding, frequencies=rotary_pairs(config, i), channels=channels.get(i))
            layers.append(_coded(layer, own))
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Of all codes, scales and centres; recurrent states are not counted."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, _Coded))


def _coded(layer: Any, rounding: _Rounding) -> Any:
    """What takes the place of a layer that transformers would have."""
    if type(layer) is DynamicLayer:
        return GlqLayer(rounding)
    if type(layer) is DynamicSlidingWindowLayer:
        return GlqSlidingLayer(rounding, layer.sliding_window)
    if isinstance(layer, CacheLayerMixin):
        raise GlqError(
            f"GlqCache holds keys and values of full and of sliding-window attention, and this model has a "
            f"{type(layer).__name__}: use transformers' own cache for it"
        )
    return layer  # a recurrent layer's state, or nothing


def cache_keyword(model: PreTrainedModel) -> str:
    """What a model calls the argument that takes a cache: past_key_values, `cache` from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def _rows(codec: KvCodec, x: Tensor, alone: Tensor | None = None) -> Tensor:
    """x [..., head_dim]. `alone` [...] is kept as the sign of the scale, which has none itself."""
    words, scales = codec.encode(x)
    if alone is not None:
        scales = torch.where(alone, -scales, scales)
    return torch.cat([words, scales[..., None].view(torch.uint8)], -1)


def _vectors(codec: KvCodec, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and `alone`."""
    words, scale = rows[..., :-_SCALE_BYTES], rows[..., -_SCALE_BYTES:]
    scales = scale.contiguous().view(torch.float16)[..., 0]
    return codec.decode(words, scales.abs(), dtype), scales.signbit()
