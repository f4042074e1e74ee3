"""Mutated checkpoints through the loader: never anything but GlqError, or the tensors that were written.

    python bench/fuzz.py [--count 200000] [--seed 0] [--folder /dev/shm]

A small checkpoint, whole or in shards, with and without digests, has one to three of its files mutated: bits flipped,
pieces cut out, doubled or filled, JSON values replaced by others of wrong type and size, headers made gigantic, entries
of the index sent out of the directory. `inspect` reads each, and what it lets through is decoded. With digests,
what is decoded must be what was written; without, it may differ, but in bounds. Exit status 1, and the mutant kept, for
the first that raises something else, takes longer than SECONDS, or opens a file outside of its directory.
"""

import argparse
import copy
import json
import random
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from glq.checkpoint import inspect
from glq.codecs import CODECS
from glq.config import GlqConfig, ModuleConfig
from glq.errors import GlqError
from glq.files import INDEX
from glq.packed import PackedLinear, packed_shapes
from glq.writer import CheckpointWriter

SECONDS = 10
_VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    {},
]
_VALUES += [
    "../x",
    "/etc/passwd",
    "..",
    "a\0b",
    "\ud800",
    [[]],
    {"a": 1},
    "model.safetensors",
    "e8-3.5",
    "nested-3.5",
    "9" * 300,
]
_PATHS = [
    "../../etc/passwd.safetensors",
    "/etc/passwd",
    "..",
    "",
    ".",
    "a/../../b.safetensors",
    "config.json",
    "\0.safetensors",
]


def write(out: Path, shards: bool) -> None:
    """Matrices of several codecs, one of each of two experts, and a plain tensor."""
    generator = torch.Generator().manual_seed(0)
    names = ("e8-2", "nested-3.5", "trellis-2")
    modules = {f"layer.{i}": ModuleConfig(codec, 48, 40, 48) for i, codec in enumerate(names)}
    modules["experts.*"] = ModuleConfig("nested-3", 32, 32, 32, 2)
    with CheckpointWriter(out) as writer:
        for entry, module in modules.items():
            shapes = packed_shapes(module.codec, module.out_features, module.in_features)
            for name in module.names(entry):
                tensors = {
                    f"{name}.{key}": torch.rand(shape, generator=generator).half()
                    if key == "scale"
                    else torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
                    for key, shape in shapes.items()
                }
                writer.add(tensors)
        writer.add({"norm.weight": torch.rand(48, generator=generator)})
        config = GlqConfig(modules, 3.0, "0.1.0")
        writer.add_json("config.json", {"model_type": "llama", "quantization_config": config.to_dict()})
        writer.commit()
    if shards:
        split(out)


def split(out: Path) -> None:
    """The same in three shards, by the writer's own hand."""
    import glq.writer

    whole, glq.writer.SHARD_BYTES = glq.writer.SHARD_BYTES, 3_000
    try:
        shutil.rmtree(out)
        write(out, shards=False)
    finally:
        glq.writer.SHARD_BYTES = whole


def decoded(folder: Path) -> dict[str, Tensor]:
    """What `inspect` lets through, as a reader takes it."""
    summary = inspect(folder)
    tensors: dict[str, Tensor] = {}
    for file in summary.files:
        with safe_open(folder / file, "pt") as f:
            tensors |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a dict
    for entry, m in summary.config.modules.items():
        for name in m.names(entry):
            parts = [tensors.pop(f"{name}.{key}") for key in ("codes", "scale", "signs")]
            tensors[name] = PackedLinear(m.codec, m.out_features, m.in_features, m.block, *parts).dequantize()
    return tensors


def mutate_bytes(data: bytes, pick: random.Random) -> bytes:
    content = bytearray(data)
    at, length = pick.randrange(len(content) + 1), pick.choice([1, 1, 2, 8, 64, 1000])
    if pick.random() < 0.5:
        at = pick.randrange(min(len(content), 2000) + 1)  # where the header is
    kind = pick.randrange(8)
    if kind == 0 and at < len(content):
        content[at] ^= 1 << pick.randrange(8)
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        del content[at : at + length]
    elif kind == 3:
        content[at:at] = pick.randbytes(length)
    elif kind == 4:
        content[at : at + length] = pick.randbytes(length)
    elif kind == 5:
        content[at:at] = content[at : at + length]
    elif kind == 6:
        content[0:8] = struct.pack("<Q", pick.choice([0, 1, 7, 2**20, 2**31, 2**32, 2**63, 2**64 - 1, len(content)]))
    else:
        content[at : at + length] = bytes(length)
    return bytes(content)


def mutate_json(value: Any, pick: random.Random) -> Any:
    """One value, at any depth, changed, removed, renamed or doubled."""
    value = copy.deepcopy(value)
    node, place = value, None
    while isinstance(node, dict | list) and node and (place is None or pick.random() < 0.75):
        place = (node, pick.choice(list(node)) if isinstance(node, dict) else pick.randrange(len(node)))
        node = place[0][place[1]]
    if place is None:
        return pick.choice(_VALUES)
    container, key = place
    kind = pick.randrange(6)
    if kind == 0:
        container.pop(key)
    elif kind == 1 and isinstance(container, dict):
        container[pick.choice([*map(str, _VALUES), *container])] = container.pop(key)
    elif kind == 2 and isinstance(node, int) and not isinstance(node, bool):
        container[key] = node + pick.choice([-1, 1, 8, 64, -node, 2**32, 2**63])
    elif kind == 3 and isinstance(container, dict):
        container[pick.choice(list(container))] = copy.deepcopy(node)
    elif kind == 4 and isinstance(node, str):
        container[key] = pick.choice([*CODECS, *_PATHS, node + "x", node.upper()])
    else:
        container[key] = copy.deepcopy(pick.choice(_VALUES))
    return value


def mutate_header(data: bytes, pick: random.Random) -> bytes:
    """The header of a safetensors file, as JSON."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.dumps(mutate_json(json.loads(data[8 : 8 + size]), pick)).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def mutate(name: str, data: bytes, pick: random.Random) -> bytes:
    if pick.random() < 0.03:
        return pick.choice([b"", b"{}", b"[]", b"null", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"9" * 10_000])
    ways: list[Callable[[bytes, random.Random], bytes]] = [mutate_bytes]
    if name.endswith(".json"):
        ways += [lambda d, p: json.dumps(mutate_json(json.loads(d), p)).encode()] * 3
    else:
        ways += [mutate_header] * 2
    return pick.choice(ways)(data, pick)


class Opened:
    """The files that this process opens through Python, by an audit hook; those that begin with `allowed` are well."""

    def __init__(self, allowed: Path) -> None:
        self.strange: list[str] = []
        self.watching = False
        self._allowed = str(allowed)
        sys.addaudithook(self._note)

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if self.watching and event == "open" and not str(args[0]).startswith(self._allowed):
            self.strange.append(str(args[0]))


def judge(folder: Path, expected: dict[str, Tensor], digests: bool) -> str:
    """ "refused", "let through", or what is wrong."""
    begun = time.monotonic()
    try:
        found = decoded(folder)
    except GlqError:
        return "refused" if time.monotonic() - begun < SECONDS else "took too long"
    except BaseException as error:  # noqa: BLE001 - the point of the exercise
        return f"raised {type(error).__name__}: {error}"
    if time.monotonic() - begun > SECONDS:
        return "took too long"
    same = found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    return "let through" if same or not digests else "was let through with other tensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="in memory, if possible")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pick, counts, begun = random.Random(options.seed), dict.fromkeys(("refused", "let through"), 0), time.monotonic()
    work = Path(tempfile.mkdtemp(dir=options.folder)).resolve()
    opened = Opened(work)
    originals = []
    for shards in (False, True):
        write(work / f"original-{shards}", shards)
        files = {file.name: file.read_bytes() for file in (work / f"original-{shards}").iterdir()}
        assert (INDEX in files) == shards
        originals.append((files, decoded(work / f"original-{shards}")))
    mutant = work / "mutant"
    for number in range(options.count):
        files, expected = pick.choice(originals)
        digests = pick.random() < 0.5
        changed = {k: v for k, v in files.items() if digests or k != "glq_sha256.json"}
        mutant.mkdir()
        for name in pick.sample(sorted(changed), min(len(changed), pick.choice([1, 1, 1, 2, 3]))):
            changed[name] = mutate(name, changed[name], pick)
        digests = digests and changed["glq_sha256.json"] == files["glq_sha256.json"]
        for name, data in changed.items():
            (mutant / name).write_bytes(data)
        opened.watching = True
        verdict = judge(mutant, expected, digests)
        opened.watching = False
        if strange := [name for name in opened.strange if not name.endswith((".py", ".pyc", ".so"))]:
            verdict = f"opened {strange[0]}"
        if verdict not in counts:
            print(f"mutant {number} of seed {options.seed} {verdict}: kept in {mutant}")
            sys.exit(1)
        counts[verdict] += 1
        shutil.rmtree(mutant)
        if number % 10_000 == 9_999:
            print(f"{number + 1:,} in {time.monotonic() - begun:.0f} s: {counts}", flush=True)
    shutil.rmtree(work)
    print(f"{options.count:,} mutants of seed {options.seed}, {time.monotonic() - begun:.0f} s: {counts}, nothing else")


if __name__ == "__main__":
    main()
