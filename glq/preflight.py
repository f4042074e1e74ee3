"""What is checked before any work: does it fit on the disk and into memory, and can it be written there at all."""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from glq.errors import GlqError
from glq.experts import ExpertLinear, quantizable
from glq.machine import available_memory
from glq.packed import packed_bytes
from glq.source import SourceModel
from glq.unfinished import folder_of

AWAY_FROM = 2**29  # bytes from which what is not worked on waits elsewhere: on disk, or, of a GPU, in the host's memory
_PROCESS = 4e8  # bytes: PyTorch and transformers themselves
_SQUARES, _COPIES = 5, 4  # fp32 matrices [in, in] and [out, in] that rounding has at its highest, at the least


@dataclass(frozen=True)
class Needs:
    """What a quantization takes, in bytes; memory is a lower bound, of the device where the work is done."""

    memory: int
    disk: int
    host: int  # memory of the host, where the work is done on a GPU
    away: bool  # what waits does so elsewhere: activations and weights on disk, or activations of a GPU on the host


def needs(source: SourceModel, codecs: dict[str, str], tokens: int, device: torch.device) -> Needs:
    """For a model whose layers take these codecs, with so many tokens of calibration."""
    shapes = {name: (rows, cols) for block in source.blocks for name, rows, cols in _matrices(source, block)}
    block = max(sum(p.numel() for p in source.module(name).parameters()) for name in source.blocks)
    widest = max(cols for _, cols in shapes.values())
    states = 2 * 4 * tokens * source.config.get_text_config().hidden_size
    on_gpu = device.type != "cpu"
    waiting = states if on_gpu else 2 * 4 * block + 2 * states + 4 * tokens * widest
    away = waiting > AWAY_FROM
    memory = max(4 * (_SQUARES * cols * cols + _COPIES * rows * cols) for rows, cols in shapes.values())
    memory += 2 * 4 * block if on_gpu else int(_PROCESS)
    packed = sum(packed_bytes(codec, *shapes[name]) for name, codec in codecs.items() if name in shapes)
    rest = source.bytes_beside(codecs)  # kept as it is
    disk = packed + rest + min(packed + rest, 2**30) + 2 * states + (2 * waiting if away and not on_gpu else 0)
    return Needs(memory + (0 if away else waiting), int(disk), states if on_gpu and away else 0, away)


def refuse_unfit(what: Needs, out: Path, device: torch.device) -> None:
    """GlqError, with the figures, if the disk or the memory is too small."""
    folder = existing(out)
    free = shutil.disk_usage(folder).free + _held(out)
    if free < what.disk:
        raise GlqError(
            f"{folder} has {free / 1e9:.1f} GB free, and quantizing takes {what.disk / 1e9:.1f} GB there, temporary "
            "files included: free some, or write to another disk"
        )
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    for name, have, least in ((device, free, what.memory), ("the host", available_memory(), what.host)):
        if have and have < least:
            raise GlqError(
                f"{name} has {have / 1e9:.1f} GB of memory left, and quantizing takes {least / 1e9:.1f} GB or "
                "more: ask for fewer --tokens, or take a machine with more"
            )


def refuse_unwritable(out: Path) -> None:
    """GlqError if nothing can be written where `out` will be."""
    folder = existing(out)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise GlqError(f"cannot write to {out.absolute().parent}: {error.strerror}") from error


def existing(out: Path) -> Path:
    """The folder that will hold `out`, or the nearest one above it that exists."""
    return next(folder for folder in out.absolute().parents if folder.exists())


def _held(out: Path) -> int:
    """Bytes that unfinished work takes there already."""
    sizes = (file.stat().st_size for file in folder_of(out).glob("*") if file.is_file())
    return sum(sizes)


def _matrices(source: SourceModel, block: str) -> Iterator[tuple[str, int, int]]:
    """Name, rows and columns of the matrices of a block; those of experts, of which there are many, as one."""
    for key, layer in quantizable(source.module(block)):
        for name in source.entries(f"{block}.{key}", layer):
            if isinstance(layer, ExpertLinear):
                count, rows, cols = layer.weight.shape
                yield name, count * rows // len(layer.entries), cols
            elif isinstance(layer, nn.Linear):
                yield name, layer.out_features, layer.in_features
