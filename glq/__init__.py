"""glq: language models 4–8 times smaller with the E8 lattice.

    glq.quantize("org/name", "out", glq.Settings(bits=3))      # Hugging Face model → checkpoint directory
    model = glq.load("out")                                    # → transformers model

`import glq` needs torch, numpy and safetensors alone; these names import what they need when they are first used.
"""

from importlib import import_module
from typing import Any

from glq.errors import GlqError, how_to_install

__version__ = "0.1.0"
__all__ = [
    "GlqCache",
    "GlqError",
    "Plan",
    "Settings",
    "TuneSettings",
    "evaluate",
    "inspect",
    "load",
    "make_plan",
    "quantize",
    "tune",
]

_LAZY = {
    "Settings": "glq.pipeline",
    "Plan": "glq.allocation",
    "make_plan": "glq.allocation",
    "quantize": "glq.recipe",
    "TuneSettings": "glq.tuning",
    "tune": "glq.tuning",
    "GlqCache": "glq.kv.cache",
    "load": "glq.hf_integration",
    "evaluate": "glq.evaluation",
    "inspect": "glq.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'glq' has no attribute {name!r}")
    try:
        return getattr(import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"glq.{name} needs {error.name}: {how_to_install('hf')}") from error
