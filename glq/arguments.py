"""What can be refused by looking at arguments alone: no import here takes long, so that a slip costs no wait.

Amounts of memory are read and written here, too.
"""

import re
from pathlib import Path

from glq.errors import GlqError

_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SHORTEST = 16  # tokens of a window for calibration


def parse_bytes(text: str) -> int:
    """ "12GB" is 12 · 10⁹, "12GiB" 12 · 2³⁰. GlqError for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?)\s*((?:[KMG]i?)?B|)", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0 or not match[2]:
        meant = "" if match is None or match[2] else f": {match[1]}GB?"
        raise GlqError(f"an amount of memory is like 12GB, 800MB or 12GiB, found {text!r}{meant}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_bytes(count: float) -> str:
    return (
        f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count:,.0f} bytes"
    )


def refuse_existing(out: Path) -> None:
    """GlqError if `out` is anything but an empty directory or nothing."""
    if out.is_file():
        raise GlqError(f"{out} is a file: name the directory to write")
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
    if text is not None and Path(text).is_dir():
        raise GlqError(f"{text} is a directory: name a UTF-8 text file")
    if text is not None and not Path(text).is_file():
        raise GlqError(f"there is no text file {text}")


def refuse_no_window(tokens: int | None, ctx: int, least: int = 2) -> None:
    """GlqError if so many tokens of a text are not a window of ctx, or that is less than `least`."""
    if ctx < least:
        raise GlqError(f"a window takes at least {least} tokens, found --ctx {ctx}")
    if tokens is not None and tokens < ctx:
        raise GlqError(f"{tokens} tokens are less than a window of {ctx}: ask for more --tokens, or a shorter --ctx")


def refuse_below(least: float, **options: float | None) -> None:
    """GlqError for an option of the command line that is given and too small."""
    for name, value in options.items():
        if value is not None and value < least:
            raise GlqError(f"--{name.replace('_', '-')} must be at least {least:g}, found {value:g}")
