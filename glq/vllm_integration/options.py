"""The plugin's options in a VllmConfig: vllm serve MODEL --additional-config '{"glq_kv_bits": 4}'"""

from typing import Any

from glq.errors import GlqError

_NAMES = ("glq_kv_bits", "glq_kv_key_bits", "glq_kv_value_bits", "glq_kv_repeatable", "glq_all_reduce")


def options_of(config: Any) -> dict[str, Any]:
    """Those of additional_config; none where it is an object of another plugin's. GlqError for one that is unknown."""
    additional = config.additional_config
    given = additional if isinstance(additional, dict) else {}
    options = {name: value for name, value in given.items() if str(name).startswith("glq")}
    if unknown := sorted(options.keys() - set(_NAMES)):
        raise GlqError(f"additional_config has unknown keys {', '.join(unknown)}: known are {', '.join(_NAMES)}")
    return options
