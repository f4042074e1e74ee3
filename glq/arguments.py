"""What can be refused by looking at arguments alone: no import here takes long, so that a slip costs no wait."""

import re
from pathlib import Path

from glq.errors import GlqError

_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """ "12GB" is 12 · 10⁹, "12GiB" 12 · 2³⁰. GlqError for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?)\s*([KMG]?i?B|)", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise GlqError(f"an amount of memory is like 12GB, 800MB or 12GiB, found {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def refuse_existing(out: Path) -> None:
    """GlqError if `out` is anything but an empty directory or nothing."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise GlqError(f"{out} exists and is not an empty directory: nothing is overwritten, name another one")


def refuse_no_model(model: str | Path) -> None:
    """GlqError for what is neither a directory nor may be a name on the hub."""
    path, name = Path(model), str(model)
    if path.is_dir():
        return
    if path.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise GlqError(f"{name} is not a directory: give a local model directory or a Hugging Face name like org/name")
    if "/" not in name:
        raise GlqError(f"there is no directory {name}; a model on the Hugging Face hub has a name like org/name")


def refuse_no_text(text: str | Path | None) -> None:
    """GlqError if a text is named and is not there."""
    if text is not None and not Path(text).is_file():
        raise GlqError(f"there is no text file {text}")
