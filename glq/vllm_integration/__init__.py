"""glq checkpoints and E8 KV caches in vLLM: `register` is an entry point of vllm.general_plugins, nothing is patched.

Nothing here is imported by the rest of glq, and vLLM only by what runs inside of it.
"""

import logging

GPT_OSS, OWN_GPT_OSS = (
    "GptOssForCausalLM",
    "GlqGptOssForCausalLM",
)  # an architecture, and the class that takes our files
TESTED = "0.32."  # what version numbers of vLLM begin with for which tests/test_vllm.py passes


def register() -> None:
    """Make quant_method "glq" and the E8 KV cache known to vLLM.

    Every process of vLLM calls it when it starts, perhaps more than once.
    """
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config
        from vllm.model_executor.models import ModelRegistry

        from glq.vllm_integration import kv
        from glq.vllm_integration.config import GlqVllmConfig
    except ImportError as error:  # other models must not suffer from a plugin that does not fit
        logging.getLogger("vllm.glq").error(
            "glq cannot load its checkpoints in this vLLM (%s): it is tested with %sx", error, TESTED
        )
        return
    register_quantization_config("glq")(GlqVllmConfig)
    if OWN_GPT_OSS not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(OWN_GPT_OSS, f"glq.vllm_integration.gpt_oss:{OWN_GPT_OSS}")
    kv.register()
