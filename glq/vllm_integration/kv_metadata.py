"""What a step's attention needs to know, made once for all layers of a group: which tokens decode, which are prompts'.

vLLM puts requests of one token ahead of all others. Nothing here waits for the GPU: what decides is known on the host.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from glq.errors import GlqError
from glq.kv.pages import PageLayout, has_kernels, prepare
from glq.vllm_integration.kv import KvOptions


@dataclass(frozen=True)
class Prompts:
    """Sequences with several new tokens each, that attention takes at once: one, or several without earlier tokens."""

    row: int  # of the first one in the page table
    tokens: slice  # of the step's
    starts: Tensor  # [sequences + 1] int32: where each one's tokens start, counted from the first
    longest: int  # new tokens of one sequence
    earlier: int  # tokens that the one sequence has in pages already


@dataclass(frozen=True)
class KvMetadata(AttentionMetadata):
    decodes: int  # sequences of one new token, which is the step's token of the same number
    page_table: Tensor  # [sequences, pages] int32
    lengths: Tensor  # [sequences] int32, new tokens included
    prompts: tuple[Prompts, ...]


class KvMetadataBuilder(AttentionMetadataBuilder[KvMetadata]):
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=False)
        context = vllm_config.compilation_config.static_forward_context
        layers = [context[name] for name in layer_names]
        self.one_by_one = KvOptions.of(vllm_config).repeatable or any(layer.impl.as_pages_hold for layer in layers)
        for queries in {layer.num_heads for layer in layers}:
            prepare(_layout(vllm_config, kv_cache_spec), queries, device, vllm_config.model_config.dtype)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """Of steps in which every sequence decodes, where kernels do it."""
        device, model = torch.device(vllm_config.device_config.device_type), vllm_config.model_config
        queries = model.get_num_attention_heads(vllm_config.parallel_config)
        if has_kernels(_layout(vllm_config, kv_cache_spec), device, model.dtype, queries):
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> KvMetadata:
        batch = common_attn_metadata
        if batch.causal is not True:
            raise GlqError("the E8 KV cache is for causal attention")
        decodes, prefills, _, _ = split_decodes_and_prefills(batch, decode_threshold=1)
        prompts = self._prompts(batch, decodes, decodes + prefills) if prefills else ()
        return KvMetadata(decodes, batch.block_table_tensor, batch.seq_lens, prompts)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> KvMetadata:
        """With short sequences: what is recorded reads their lengths when it is replayed."""
        metadata = self.build(0, common_attn_metadata)
        metadata.lengths.fill_(1)
        return metadata

    def _prompts(self, batch: Any, first: int, end: int) -> tuple[Prompts, ...]:
        """Sequences first … end - 1: those without earlier tokens together as far as they follow each other."""
        places = batch.query_start_loc_cpu.tolist()
        lengths = batch.seq_lens_cpu_upper_bound.tolist()  # exact for prompts
        earlier = [max(lengths[i] - (places[i + 1] - places[i]), 0) for i in range(first, end)]  # vLLM warms up, too
        prompts, i = [], first
        while i < end:
            j = i + 1
            if not self.one_by_one and not earlier[i - first]:
                while j < end and not earlier[j - first]:
                    j += 1
            starts = batch.query_start_loc[i : j + 1]
            longest = max(b - a for a, b in zip(places[i:j], places[i + 1 : j + 1], strict=True))
            if longest:
                tokens = slice(places[i], places[j])
                prompts.append(Prompts(i, tokens, starts - starts[0], longest, earlier[i - first]))
            i = j
        return tuple(prompts)


def _layout(config: Any, spec: Any) -> PageLayout:
    options = KvOptions.of(config)
    return PageLayout(spec.num_kv_heads, spec.head_size, options.key_bits, options.value_bits, spec.block_size)
