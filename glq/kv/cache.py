"""`GlqCache`: a transformers Cache whose keys and values are kept as E8 codes of 4, 3 or 2 bits a channel.

A layer keeps one uint8 tensor for its keys and one for its values, [batch, heads, tokens, row]: a row is the code words
of one head vector and the two bytes of its fp16 scale. transformers' dynamic layers append, cut, reorder and repeat
rows as they do 16-bit vectors; `update` encodes what comes and decodes what goes to attention. Every token is rounded
once, as it comes, and never again. What all keys have in common is subtracted first: it makes much of their length,
their error goes with their length, and no attention weight depends on it.
"""

import inspect
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
from glq.kv.codec import KvCodec, kv_codec, narrow

_SCALE_BYTES = 2
_LARGEST = torch.finfo(torch.float16).max  # what is beyond it decodes to NaN, and shall not take others with it
_CENTRED = 16  # keys that a mean is taken of, at least: fewer tell little, and the first token's is unlike all others


class _Coded:
    """Over a dynamic layer: rows of codes where it keeps keys and values, the keys' less a `centre` of each sequence.

    centre [batch, heads, 1, head_dim], in the keys' dtype, is the mean of the first keys that come, if enough come at
    once: about half of keys' energy is the same in every token.
    """

    supports_early_init = False  # the layer's tensors are not the shape and type that early initialization would give
    key_codec: KvCodec
    value_codec: KvCodec
    centred: bool
    centre: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Encodes the new [batch, heads, tokens, head_dim]; returns what attention sees, decoded, in their dtypes."""
        first = not self.is_initialized  # type: ignore[attr-defined]
        if self.centred and first and key_states.shape[-2] >= _CENTRED:
            sane = torch.where(key_states.abs() <= _LARGEST, key_states, 0).float()  # NaN is not, either
            self.centre = sane.mean(-2, keepdim=True).to(key_states.dtype)
        centre = 0.0 if self.centre is None else self.centre.float()
        new = (_rows(self.key_codec, key_states.float() - centre), _rows(self.value_codec, value_states))
        keys, values = super().update(*new, *args, **kwargs)  # type: ignore[misc]
        keys = _vectors(self.key_codec, keys, torch.float32) + centre
        return narrow(keys, key_states.dtype), _vectors(self.value_codec, values, value_states.dtype)

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.centre = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        if self.centre is not None:
            self.centre = self.centre.index_select(0, beam_idx.to(self.centre.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.centre is not None:
            self.centre = self.centre.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        if self.centre is not None:
            self.centre = self.centre[indices]

    def offload(self) -> None:
        raise GlqError("GlqCache is not offloaded to the CPU: it is for GPU memory, use it without offloading")

    prefetch = offload

    @property
    def nbytes(self) -> int:
        kept = [self.keys, self.values, self.centre] if self.is_initialized else []  # type: ignore[attr-defined]
        return sum(part.nbytes for part in kept if part is not None)


class GlqLayer(_Coded, DynamicLayer):
    """Full attention."""

    def __init__(self, key_codec: KvCodec, value_codec: KvCodec, centred: bool) -> None:
        super().__init__()
        self.key_codec, self.value_codec, self.centred = key_codec, value_codec, centred


class GlqSlidingLayer(_Coded, DynamicSlidingWindowLayer):
    """Sliding-window and chunked attention: the window's tokens alone are kept."""

    def __init__(self, key_codec: KvCodec, value_codec: KvCodec, centred: bool, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.key_codec, self.value_codec, self.centred = key_codec, value_codec, centred


class GlqCache(Cache):
    """`model.generate(..., past_key_values=GlqCache(bits=4, config=model.config))`.

    bits: 4, 3 or 2, of keys and values; key_bits and value_bits where they differ. config: the model's; with it, layers
    with a sliding window keep that alone, and recurrent layers their state. Without it, every layer keeps all. centre:
    whether the mean of the first keys is subtracted; pages of a server (glq.kv.pages) hold what it gives without.
    GlqError for other bits, for a head_dim that is no multiple of 8, and layers that keep more than keys and values.
    """

    def __init__(
        self,
        bits: int = 4,
        *,
        key_bits: int | None = None,
        value_bits: int | None = None,
        config: PreTrainedConfig | None = None,
        centre: bool = True,
    ) -> None:
        keys, values = (kv_codec(bits if own is None else own) for own in (key_bits, value_bits))
        if config is None:
            super().__init__(layer_class_to_replicate=partial(GlqLayer, keys, values, centre))
        else:
            layers = DynamicCache(config=config).layers
            super().__init__(layers=[_coded(layer, keys, values, centre) for layer in layers])

    @property
    def nbytes(self) -> int:
        """Of all codes, scales and centres; recurrent states are not counted."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, _Coded))


def _coded(layer: Any, key_codec: KvCodec, value_codec: KvCodec, centred: bool) -> Any:
    """What takes the place of a layer that transformers would have."""
    if type(layer) is DynamicLayer:
        return GlqLayer(key_codec, value_codec, centred)
    if type(layer) is DynamicSlidingWindowLayer:
        return GlqSlidingLayer(key_codec, value_codec, centred, layer.sliding_window)
    if isinstance(layer, CacheLayerMixin):
        raise GlqError(
            f"GlqCache holds keys and values of full and of sliding-window attention, and this model has a "
            f"{type(layer).__name__}: use transformers' own cache for it"
        )
    return layer  # a recurrent layer's state, or nothing


def cache_keyword(model: PreTrainedModel) -> str:
    """What a model calls the argument that takes a cache: past_key_values, `cache` from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def _rows(codec: KvCodec, x: Tensor) -> Tensor:
    words, scales = codec.encode(x)
    return torch.cat([words, scales[..., None].view(torch.uint8)], -1)


def _vectors(codec: KvCodec, rows: Tensor, dtype: torch.dtype) -> Tensor:
    words, scale = rows[..., :-_SCALE_BYTES], rows[..., -_SCALE_BYTES:]
    return codec.decode(words, scale.contiguous().view(torch.float16)[..., 0], dtype)
