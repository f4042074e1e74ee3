"""The plugin's options in a VllmConfig: vllm serve MODEL --additional-config '{"glq_kv_bits": 4}'"""

from typing import Any


def options_of(config: Any) -> dict[str, Any]:
    """What additional_config holds, others' options too; nothing where it is an object of another plugin's."""
    additional = config.additional_config
    return additional if isinstance(additional, dict) else {}
