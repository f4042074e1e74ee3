"""Decoding in CUDA graphs: one launch a token instead of hundreds, with no compiler.

transformers' `generate` takes a compiled forward pass for its decoding steps where the cache is static
(`cache_implementation="static"`). A captured graph of the plain one is as fast where launches are what costs, and
starts in a second.
"""

import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel
from transformers.cache_utils import StaticCache, StaticLayer
from transformers.masking_utils import create_masks_for_generate

from glq import nvrtc
from glq.errors import GlqError
from glq.step.program import Program
from glq.step.proof import prove
from glq.step.record import Recording, record

_RECORDINGS = 3  # of one step whose calls are not yet the same each time


class GraphedForward:
    """A model's forward pass for one token a sequence, as a CUDA graph.

    The first call with new sizes or a new cache runs as it is, which warms up; a later one is captured; from then on
    inputs are copied and the graph is replayed. Its output lies in the same memory each time. Whatever is no step with
    one token and a static cache runs as it is.

    fused: the first call is recorded, and small operations become few kernels (glq.step). The second call is done both
    ways, and if the two differ by more than the model does from itself, the model's own pass is what is captured.
    """

    def __init__(self, forward: Callable[..., Any], fused: bool = True) -> None:
        self._forward, self._fused = forward, fused
        self._key: tuple[Any, ...] | None = None
        self._forget()

    @property
    def is_fused(self) -> bool:
        """Whether a graph of few kernels is replayed."""
        return self._graph is not None and self._proved

    def _forget(self) -> None:
        self.remark = ""  # in which way fused steps are not, bit for bit, the model's before kernels are fused
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._output: Any = None
        self._unproven: Program | None = None
        self._proved = False
        self._recordings = 0
        self._next: Callable[[], Any] | None = None  # a step on `_inputs`

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        name = "cache" if "cache" in inputs else "past_key_values"  # transformers' name for it, from 5.24 on or before
        cache = inputs.pop(name, None)
        given, structure = tree_flatten(inputs)
        tensors = [x for x in given if isinstance(x, Tensor)]
        if not _is_step(cache, inputs):
            return self._forward(**{name: cache}, **inputs)
        others = tuple(None if isinstance(x, Tensor) else x for x in given)
        shapes = tuple((x.shape, x.dtype, x.device) for x in tensors)
        key = (structure, others, shapes, _addresses(cache))
        if key != self._key:
            self._key = key
            return self._begin({name: cache}, given, structure)
        for kept, new in zip(self._inputs, tensors, strict=True):
            kept.copy_(new)
        assert self._next is not None
        if self._unproven is not None:
            return self._prove(self._unproven, self._next)
        if self._graph is None:
            self._graph = self._capture(self._next)
        self._graph.replay()
        return self._output

    def _begin(self, cache: dict[str, Any], given: list[Any], structure: Any) -> Any:
        self._forget()
        kept = [x.clone() if isinstance(x, Tensor) else x for x in given]
        self._inputs = [x for x in kept if isinstance(x, Tensor)]
        inputs = tree_unflatten(kept, structure)
        self._next = partial(self._forward, **cache, **inputs)
        device = self._inputs[0].device
        if not self._fused or not nvrtc.compiles_for(device):
            return self._next()
        output, recording = record(self._next)
        self._try(recording, device)
        return output

    def _try(self, recording: Recording, device: torch.device) -> None:
        self._recordings += 1
        try:
            self._unproven = Program(recording, nvrtc.gpu(device))
        except GlqError as error:
            self._keep_kernels(str(error))

    def _prove(self, program: Program, step: Callable[[], Any]) -> Any:
        proof = prove(program, step)
        self._unproven, self.remark, self._proved = None, proof.remark, proof.right
        if proof.right:
            self._next = program.run
        elif proof.again is not None and self._recordings < _RECORDINGS:
            self._try(proof.again, self._inputs[0].device)
        else:
            self._keep_kernels(proof.remark)
        return proof.output

    def _keep_kernels(self, reason: str) -> None:
        self.remark = reason
        warnings.warn(f"the decoding step keeps its kernels: {reason}", stacklevel=5)

    def _capture(self, step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._output = step()
        except RuntimeError as error:
            raise GlqError(
                "this model's decoding step cannot be captured as a CUDA graph: call generate with "
                "disable_compile=True, or have it compiled with compile_config=CompileConfig()"
            ) from error
        return graph


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
        and _stays(cache)
        and not torch.cuda.is_current_stream_capturing()
    )


def _stays(cache: Any) -> bool:
    """Whether it is a cache whose memory stays where it is."""
    return isinstance(cache, StaticCache) and all(
        type(layer) is StaticLayer and layer.is_initialized for layer in cache.layers
    )


def _mask_for_step(config: Any, inputs_embeds: Tensor, attention_mask: Any, past_key_values: Any, **others: Any) -> Any:
    """In the place of transformers' `create_masks_for_generate`, which takes some 20 operations ahead of each step.

    For a step it is the mask of tokens, filled up to the cache's length: the forward pass makes the same of it, and
    that is part of the graph.
    """
    if (
        isinstance(attention_mask, Tensor)
        and attention_mask.ndim == 2
        and inputs_embeds.shape[1] == 1
        and config._attn_implementation == "sdpa"
        and _stays(past_key_values)
    ):
        return pad(attention_mask, (0, past_key_values.layers[0].max_cache_len - attention_mask.shape[1]))
    return create_masks_for_generate(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        **others,
    )


class _Calls:
    """In the place of a model's `get_compiled_call`: a copy of the model, or one from a pickle, gets its own."""

    def __init__(self, model: PreTrainedModel, fused: bool) -> None:
        self._model = weakref.ref(model)  # weak: a model's memory is free as soon as it is deleted
        self._fused = fused

    def __call__(self, compile_config: Any = None) -> Callable[..., Any]:
        """What `generate` decodes with; its graph ends with it, as does the cache that the graph writes into."""
        model = self._model()
        assert model is not None
        devices = set(getattr(model, "hf_device_map", {}).values())
        if compile_config is not None or model.device.type != "cuda" or len(devices) > 1:
            return type(model).get_compiled_call(model, compile_config)
        return GraphedForward(model.__call__, self._fused)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model(), "fused": self._fused}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model, self._fused = weakref.ref(state["model"]), state["fused"]


def decode_in_graphs(model: PreTrainedModel, fused: bool = True) -> None:
    """Have `generate` use graphs where it would compile, but not with a compile_config or on several GPUs.

    fused: with fewer and faster kernels for what lies between the model's products.
    """
    model.get_compiled_call = _Calls(model, fused)
    if not hasattr(type(model), "create_masks_for_generate"):  # a model that has one knows better
        model.create_masks_for_generate = _mask_for_step
