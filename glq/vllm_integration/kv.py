"""The E8 KV cache in vLLM: its options, and which attention backend a model gets.

    vllm serve MODEL --attention-backend CUSTOM --additional-config '{"glq_kv_bits": 4}'

CUSTOM is vLLM's name for a plugin's backend, and additional_config is where a plugin finds its options. Without both,
every layer gets the backend that vLLM itself would take.
"""

from dataclasses import dataclass
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from glq.errors import GlqError
from glq.kv.codec import kv_codec
from glq.vllm_integration.options import options_of

_EXAMPLE = "--attention-backend CUSTOM --additional-config '{\"glq_kv_bits\": 4}'"


def register() -> None:
    """Offer the backend. vLLM for CPUs has one backend for all models, which is looked up in another place then."""
    custom = AttentionBackendEnum.CUSTOM
    if not custom.is_overridden():  # it may be another plugin's
        register_backend(custom, f"{__name__}.Selected")
        if current_platform.is_cpu():
            register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.SelectedOnCpu")


def __getattr__(name: str) -> Any:
    """The two names above are looked up, as vLLM does it, when a layer asks for its backend: they depend on options."""
    if name not in ("Selected", "SelectedOnCpu"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config

    from glq.vllm_integration.kv_backend import backend

    config = get_current_vllm_config()
    if name == "SelectedOnCpu" and not wanted(config):
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return CPUAttentionBackend
    options = KvOptions.of(config)
    return backend(options.key_bits, options.value_bits)


def wanted(config: Any) -> bool:
    """Whether a VllmConfig asks for the E8 KV cache. GlqError if it does by half."""
    chosen = config.attention_config.backend == AttentionBackendEnum.CUSTOM
    if not chosen and _asks(config):
        raise GlqError(f"additional_config asks for an E8 KV cache, --attention-backend does not: give {_EXAMPLE}")
    return chosen


def check(config: Any) -> None:
    """GlqError where options ask for an E8 KV cache that cannot be had: not every model asks for a backend of ours."""
    if _asks(config) and wanted(config):
        KvOptions.of(config)


def _asks(config: Any) -> bool:
    return any(name.startswith("glq_kv") for name in options_of(config))


@dataclass(frozen=True)
class KvOptions:
    """`repeatable`: attention over a prompt sees keys and values as pages hold them, its own tokens', too.

    What comes out then depends neither on how the scheduler cuts a prompt, nor on prefix caching and preemption.
    Without it, tokens that come together see each other in 16 bits: less error in prompts, and less work.
    """

    key_bits: int
    value_bits: int
    repeatable: bool = False

    @classmethod
    def of(cls, config: Any) -> "KvOptions":
        """Those of a VllmConfig. GlqError for what it cannot be."""
        given = options_of(config)
        both = given.get("glq_kv_bits")
        keys, values = given.get("glq_kv_key_bits", both), given.get("glq_kv_value_bits", both)
        if keys is None or values is None:
            raise GlqError(f"--attention-backend CUSTOM is the E8 KV cache, which needs its bits: give {_EXAMPLE}")
        kv_codec(keys), kv_codec(values)
        _check(config)
        return cls(keys, values, bool(given.get("glq_kv_repeatable", False)))


def _check(config: Any) -> None:
    cache, parallel = config.cache_config, config.parallel_config
    refused = {
        f"--kv-cache-dtype {cache.cache_dtype}": cache.cache_dtype not in ("auto", "bfloat16", "float16"),
        "--kv-cache-dtype-skip-layers": cache.kv_cache_dtype_skip_layers,
        "speculative decoding": config.speculative_config is not None,
        "a KV connector": config.kv_transfer_config is not None,
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "MLA": config.model_config.use_mla,
    }
    if found := [name for name, is_so in refused.items() if is_so]:
        raise GlqError(f"the E8 KV cache does not go with {', '.join(found)}")
