"""The attention backend of the E8 KV cache: what vLLM asks about it, and what its pages are.

vLLM has a page as [heads, tokens, bytes of one token of one head]. These are as many bytes as glq.kv.layout's page, and
one run of memory, so it is taken as that run.
"""

from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, SlidingWindowSpec

from glq.errors import GlqError
from glq.kv.pages import PageLayout


class GlqKvBackend(AttentionBackend):
    """One class for each pair of bits: vLLM asks classes, at times when its config is not at hand."""

    key_bits: ClassVar[int]
    value_bits: ClassVar[int]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        from glq.vllm_integration.kv_attention import GlqKvAttention

        return GlqKvAttention

    @staticmethod
    def get_builder_cls() -> Any:
        from glq.vllm_integration.kv_metadata import KvMetadataBuilder

        return KvMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """A page of codes in place of one of 16-bit vectors. vLLM asks with one token a page, too."""
        if spec.state_content_bytes is not None:
            return spec
        if type(spec) not in (FullAttentionSpec, SlidingWindowSpec) or spec.head_size_v != spec.head_size:
            raise GlqError(
                f"the E8 KV cache holds keys and values of equal width, of full and of sliding-window attention, and "
                f"this model asks for {type(spec).__name__} of {spec.head_size} and {spec.head_size_v} channels"
            )
        page = PageLayout(1, spec.head_size, cls.key_bits, cls.value_bits)
        return replace(spec, dtype=torch.uint8, state_content_bytes=page.nbytes // page.page_tokens)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 8 == 0 and (head_size <= 256 or current_platform.is_cpu())  # flash-attn's for prompts

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        return dtype in (torch.float16, torch.bfloat16) or current_platform.is_cpu()

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability.major >= 8

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """As vLLM has it, but it stops at the first layer that does not fit."""
        if reasons := super().validate_configuration(*args, **kwargs):
            raise GlqError(f"the E8 KV cache does not fit this model: {', '.join(reasons)}")
        return []


@cache
def backend(key_bits: int, value_bits: int) -> type[GlqKvBackend]:
    """The class for these bits, which vLLM finds again by its name."""
    name = f"GlqKv{key_bits}{value_bits}Backend"
    return type(name, (GlqKvBackend,), {"key_bits": key_bits, "value_bits": value_bits, "__module__": __name__})


def __getattr__(name: str) -> type[GlqKvBackend]:
    if name.startswith("GlqKv") and name.endswith("Backend") and len(bits := name[5:-7]) == 2 and bits.isdigit():
        return backend(int(bits[0]), int(bits[1]))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def pages_of(kv_cache: Tensor, layout: PageLayout) -> Tensor:
    """vLLM's [pages, heads, page_tokens, bytes] as pages [pages, nbytes]."""
    return kv_cache.as_strided((len(kv_cache), layout.nbytes), (kv_cache.stride(0), 1))
