"""Decoding in CUDA graphs: one launch a token instead of hundreds, with no compiler.

transformers' `generate` takes a compiled forward pass for its decoding steps where the cache is static
(`cache_implementation="static"`). A captured graph of the plain one is as fast where launches are what costs, and
starts in a second.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel
from transformers.cache_utils import StaticCache, StaticLayer

from glq.errors import GlqError


class GraphedForward:
    """A model's forward pass for one token a sequence, as a CUDA graph.

    The first call with new sizes or a new cache runs as it is, which warms up; the second is captured; from then on
    inputs are copied and the graph is replayed. Its output lies in the same memory each time. Whatever is no step with
    one token and a static cache runs as it is.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self._key: tuple[Any, ...] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._output: Any = None

    @torch.no_grad()
    def __call__(self, past_key_values: Any = None, **inputs: Any) -> Any:
        given, structure = tree_flatten(inputs)
        tensors = [x for x in given if isinstance(x, Tensor)]
        if not _is_step(past_key_values, inputs):
            return self._forward(past_key_values=past_key_values, **inputs)
        others = tuple(None if isinstance(x, Tensor) else x for x in given)
        shapes = tuple((x.shape, x.dtype, x.device) for x in tensors)
        key = (structure, others, shapes, _addresses(past_key_values))
        if key != self._key:
            self._key, self._graph, self._output = key, None, None
            return self._forward(past_key_values=past_key_values, **inputs)
        if self._graph is None:
            self._capture(past_key_values, given, structure)
        for kept, new in zip(self._inputs, tensors, strict=True):
            kept.copy_(new)
        assert self._graph is not None
        self._graph.replay()
        return self._output

    def _capture(self, cache: Any, given: list[Any], structure: Any) -> None:
        kept = [x.clone() if isinstance(x, Tensor) else x for x in given]
        self._inputs = [x for x in kept if isinstance(x, Tensor)]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._output = self._forward(past_key_values=cache, **tree_unflatten(kept, structure))
        except RuntimeError as error:
            raise GlqError(
                "this model's decoding step cannot be captured as a CUDA graph: call generate with "
                "disable_compile=True, or have it compiled with compile_config=CompileConfig()"
            ) from error
        self._graph = graph


def _addresses(cache: StaticCache) -> tuple[int, ...]:
    """Where keys, values and lengths lie: beam search replaces keys and values, one after the other."""
    return tuple(t.data_ptr() for layer in cache.layers for t in (layer.keys, layer.values, layer.cumulative_length))


def _is_step(cache: Any, inputs: dict[str, Any]) -> bool:
    """Whether these inputs are those of a decoding step whose memory stays where it is."""
    ids = inputs.get("input_ids")
    return (
        isinstance(ids, Tensor)
        and ids.is_cuda
        and ids.shape[-1] == 1
        and isinstance(cache, StaticCache)
        and all(type(layer) is StaticLayer and layer.is_initialized for layer in cache.layers)
        and not torch.cuda.is_current_stream_capturing()
    )


class _Calls:
    """In the place of a model's `get_compiled_call`: a copy of the model, or one from a pickle, gets its own."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)  # weak: a model's memory is free as soon as it is deleted

    def __call__(self, compile_config: Any = None) -> Callable[..., Any]:
        """What `generate` decodes with; its graph ends with it, as does the cache that the graph writes into."""
        model = self._model()
        assert model is not None
        devices = set(getattr(model, "hf_device_map", {}).values())
        if compile_config is not None or model.device.type != "cuda" or len(devices) > 1:
            return type(model).get_compiled_call(model, compile_config)
        return GraphedForward(model.__call__)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model = weakref.ref(state["model"])


def decode_in_graphs(model: PreTrainedModel) -> None:
    """Have `generate` use graphs where it would compile, but not with a compile_config or on several GPUs."""
    model.get_compiled_call = _Calls(model)
