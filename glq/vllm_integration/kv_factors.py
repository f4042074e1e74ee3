"""What keys are multiplied by before pages take them, by layer: from the norms in a checkpoint's files.

vLLM's models are not transformers', and a layer's attention sees neither. So transformers' model is built without
weights, the norms of queries and keys are read into it, and glq.kv.channels says the rest. Pages are read with the
factors that they were written with, so a mistake here would cost precision, and no more.
"""

from functools import cache
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

from glq.hub import at_hand
from glq.kv.channels import key_channels

_log = getLogger("vllm.glq")
_NORMS = (".q_norm.weight", ".q_norm.bias", ".k_norm.weight", ".k_norm.bias")


def factors_of(config: Any, name: str) -> Tensor | None:
    """[head_dim] fp32, of the layer that a VllmConfig's model calls so. None if nothing is known of its keys."""
    if config.load_config.load_format == "dummy":
        return None
    model = config.model_config
    path = at_hand(model.model, model.revision, config.load_config.download_dir)
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return factors_in(path).get(numbers[0]) if path is not None and len(numbers) == 1 else None


@cache
def factors_in(path: Path) -> dict[int, Tensor]:
    """By layer, of the model in a directory. None for one without such norms, or that transformers does not know."""
    try:
        model = _skeleton(path)
        norms = [parameter for parameter, _ in model.named_parameters() if parameter.endswith(_NORMS)]
        model.load_state_dict(_read(path, norms), strict=False, assign=True)
        found = {layer: channels.factors for layer, channels in key_channels(model).items()}
    except Exception:  # noqa: BLE001 (vLLM serves models that transformers fails at in many ways)
        return {}
    if found:
        _log.info("pages of the E8 KV cache: keys of %d layers have factors from norms of queries and keys", len(found))
    return found


def _skeleton(path: Path) -> PreTrainedModel:
    """The decoder of text, on the meta device."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config(decoder=True)
    with torch.device("meta"):
        return AutoModel.from_config(config, trust_remote_code=False, attn_implementation="eager")


def _read(path: Path, names: list[str]) -> dict[str, Tensor]:
    """Of the tensors called so after any prefix, those that there is one of; by these names."""
    found: dict[str, list[tuple[Path, str]]] = {name: [] for name in names}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is no mapping)
                parts = key.split(".")
                for start in range(len(parts)):
                    if (places := found.get(".".join(parts[start:]))) is not None:
                        places.append((file, key))
    read = {}
    for name, places in found.items():
        if len(places) == 1:
            file, key = places[0]
            with safe_open(file, "pt") as tensors:
                read[name] = tensors.get_tensor(key)
    return read
