"""Attention over an E8 KV cache, one layer's: new tokens become codes, decodes read codes, prompts vectors."""

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from glq.errors import GlqError
from glq.kv.pages import PageLayout, attend, gather, write
from glq.vllm_integration.kv import KvOptions
from glq.vllm_integration.kv_backend import pages_of
from glq.vllm_integration.kv_factors import factors_of
from glq.vllm_integration.kv_metadata import KvMetadata, Prompts
from glq.vllm_integration.kv_prompts import prompt_attention


class GlqKvAttention(AttentionImpl[KvMetadata]):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        refused = {
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
            "ALiBi": alibi_slopes is not None,
            f"a {kv_cache_dtype} KV cache": kv_cache_dtype not in ("auto", "bfloat16", "float16"),
        } | {f"{name}={value!r}": value is not None for name, value in others.items()}
        if found := [name for name, is_so in refused.items() if is_so]:
            raise GlqError(f"the E8 KV cache does not go with {', '.join(found)}, which this model has")
        config = self.config = get_current_vllm_config()
        self.factors: Tensor | None = None
        self.options = KvOptions.of(config)
        # A layer that reads another's pages may have no keys and values of its own
        self.as_pages_hold = self.options.repeatable or kv_sharing_target_layer_name is not None
        self.longest = config.model_config.max_model_len
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.window, self.softcap = sliding_window, logits_soft_cap or None
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.layout(16)  # GlqError for a head size that has no pages

    def layout(self, page_tokens: int) -> PageLayout:
        options = self.options
        return PageLayout(self.num_kv_heads, self.head_size, options.key_bits, options.value_bits, page_tokens)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Before this a layer does not know its name, and afterwards pages are written.

        When weights are loaded again, pages and CUDA graphs keep the factors that they have. As a buffer of the layer
        these outlast a sleep of the engine.
        """
        layers = self.config.compilation_config.static_forward_context
        name, layer = next((found for found in layers.items() if getattr(found[1], "impl", None) is self), ("", None))
        factors = factors_of(self.config, self.kv_sharing_target_layer_name or name)
        if self.factors is None and layer is not None and factors is not None and len(factors) == self.head_size:
            self.factors = factors.to(self.config.device_config.device_type)
            layer.register_buffer("glq_key_factors", self.factors, persistent=False)

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Every new token's codes, before attention reads them. What is padded beyond slot_mapping has none."""
        layout, tokens = self.layout(kv_cache.shape[2]), min(len(key), len(slot_mapping))
        write(pages_of(kv_cache, layout), layout, key[:tokens], value[:tokens], slot_mapping[:tokens], self.factors)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: KvMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query [tokens, heads, head_size], key and value [tokens, kv heads, head_size] → output, like query."""
        if attn_metadata is None:  # vLLM measures memory: the most that `_decoded` gives is part of it
            torch.empty(2, self.longest, self.num_kv_heads, self.head_size, dtype=query.dtype, device=query.device)
            return output.fill_(0)
        step, layout = attn_metadata, self.layout(kv_cache.shape[2])
        pages = pages_of(kv_cache, layout)
        if n := step.decodes:
            table, how = step.page_table[:n], (self.scale, self.window, self.softcap, self.factors)
            output[:n] = attend(query[:n], pages, layout, table, step.lengths[:n], *how)
        for prompts in step.prompts:
            part = prompts.tokens
            if prompts.earlier or self.as_pages_hold:
                keys, values = self._decoded(pages, layout, step.page_table[prompts.row], prompts, query.dtype)
                if not self.as_pages_hold:
                    new = part.stop - part.start
                    keys[-new:], values[-new:] = key[part], value[part]
            else:
                keys, values = key[part], value[part]
            output[part] = prompt_attention(
                query[part], keys, values, prompts.starts, prompts.longest, self.scale, self.window, self.softcap
            )
        return output

    def _decoded(
        self, pages: Tensor, layout: PageLayout, page_table_row: Tensor, prompts: Prompts, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the earlier tokens that are in the window of any new one, and of the new ones."""
        unseen = max(prompts.earlier - self.window + 1, 0) if self.window else 0  # by the first new token
        page = unseen // layout.page_tokens  # pages ahead of it may be others' by now
        tokens = prompts.earlier + prompts.longest - page * layout.page_tokens
        return gather(pages, layout, page_table_row[page:], tokens, dtype, self.factors)
