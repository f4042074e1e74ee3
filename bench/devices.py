"""How much faster several GPUs round the matrices of a decoder block than one, and whether the bytes are the same.

    python bench/devices.py OUT.json [--devices 0,1] [--codec trellis-4 trellis-2] [--shape llama-3-8b] [--experts 8]

Random weights, moments of random activations. Each figure is the median of the last three of five times: a device that
takes a matrix of a shape for the first time captures graphs, and which one takes what depends on the time. The groups
of the block are given all at once, as by `glq quantize --side-by-side`: without it one waits for the other, and there
is nothing to share out in a dense model. Experts of a mixture are given as many at once as there are devices.
"""

import argparse
import copy
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

TIMES = 5


def moments(width: int, device: Any) -> Any:
    """Of random activations, channels of which are more or less large; computed once, for all devices alike."""
    import torch

    from glq.moments import Moments

    generator = torch.Generator(device).manual_seed(width)
    scale = torch.rand(width, generator=generator, device=device) + 0.1
    x = torch.randn(4096, width, generator=generator, device=device) * scale
    drift = torch.randn(width, width, generator=generator, device=device) / width
    return Moments(x.T @ x / len(x), drift)


def block(shape: dict[str, int], device: Any) -> list[Any]:
    """The groups of a Llama's block."""
    hidden, inside = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    sizes = [
        ({"q_proj": hidden, "k_proj": kv, "v_proj": kv}, hidden),
        ({"o_proj": hidden}, hidden),
        ({"gate_proj": inside, "up_proj": inside}, hidden),
        ({"down_proj": hidden}, inside),
    ]
    return [group(rows, width, device) for rows, width in sizes]


def experts(count: int, device: Any) -> list[Any]:
    """Gate and up of a mixture's experts, 2,048 wide with 768 inside as in Qwen3-30B-A3B."""
    return [group({"e.*.gate": 768, "e.*.up": 768}, 2048, device, e) for e in range(count)]


def group(rows: dict[str, int], width: int, device: Any, expert: int | None = None) -> Any:
    import torch
    from torch import nn

    from glq.calibration import Group

    layers = {}
    for i, (name, out) in enumerate(rows.items()):
        generator = torch.Generator(device).manual_seed(1000 * (expert or 0) + i)
        weight = torch.randn(out, width, generator=generator, device=device) / width**0.5
        layers[name] = nn.Linear(width, out, bias=False, device="meta")
        layers[name].weight = nn.Parameter(weight, requires_grad=False)
    return Group(layers, moments(width, device), expert, 4096)


def wait(devices: Sequence[Any]) -> None:
    import torch

    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


class Timed:
    """A rounder, which keeps its graphs, and the weights that its groups have again after each time."""

    def __init__(self, groups: list[Any], devices: Sequence[Any], codec: str) -> None:
        self.groups, self.devices, self.codec = groups, devices, codec
        self.weights = [{name: layer.weight.data for name, layer in group.layers.items()} for group in groups]
        self.digest = ""

    def seconds(self) -> list[float]:
        """Of TIMES times; `digest` is that of all that was written."""
        from glq.rounder import Choice, GroupRounder
        from glq.workers import Devices
        from glq.writer import CheckpointWriter

        found = []
        with tempfile.TemporaryDirectory() as folder, CheckpointWriter(Path(folder) / "out") as writer:
            rounder = GroupRounder(writer, Devices(self.devices), 0, 0.1)
            for _ in range(TIMES):
                written: dict[str, Any] = {}  # a thread writes, which the work does not wait for: not timed here
                writer.add = written.update  # type: ignore[method-assign]
                fresh = [replace(group, moments=copy.deepcopy(group.moments)) for group in self.groups]  # overwritten
                choices = [Choice(group, dict.fromkeys(group.layers, self.codec)) for group in fresh]
                step = len(choices) if self.groups[0].expert is None else len(self.devices)
                wait(self.devices)
                start = time.perf_counter()
                for i in range(0, len(choices), step):
                    rounder(*choices[i : i + step])
                wait(self.devices)
                found.append(time.perf_counter() - start)
                for group, weights in zip(self.groups, self.weights, strict=True):
                    for name, weight in weights.items():
                        group.layers[name].weight.data = weight
                digest = hashlib.sha256()
                for name, tensor in sorted(written.items()):
                    digest.update(name.encode() + tensor.cpu().numpy().tobytes())
                self.digest = digest.hexdigest()
        return found


def measure(what: str, groups: list[Any], devices: Sequence[Any], codec: str) -> dict[str, Any]:
    """On one device, and on all."""
    weights = sum(layer.weight.numel() for group in groups for layer in group.layers.values())
    row: dict[str, Any] = {"what": what, "codec": codec, "weights": weights}
    digests = set()
    for name, some in (("one", devices[:1]), ("all", devices)):
        timed = Timed(groups, some, codec)
        row[f"{name}_times"] = timed.seconds()
        row[f"{name}_seconds"] = statistics.median(row[f"{name}_times"][-3:])
        row[f"{name}_per_second"] = weights / row[f"{name}_seconds"]
        digests.add(timed.digest)
    row["same_bytes"], row["speedup"] = len(digests) == 1, row["one_seconds"] / row["all_seconds"]
    return row


def main() -> None:
    here = Path(__file__).resolve().parent
    from served import SHAPES

    sys.path[:] = [p for p in sys.path if Path(p).resolve() != here]  # transformers would import kernels.py from there
    import torch

    from glq.spread import pick_devices

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--devices", default="0,1")
    parser.add_argument("--codec", nargs="*", default=["trellis-4", "trellis-2"])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--experts", type=int, default=8, help="0 for none")
    args = parser.parse_args()
    devices, rows = pick_devices(args.devices.split(",")), []
    with torch.no_grad():
        for codec in args.codec:
            for what in (args.shape, "experts"):
                groups = block(SHAPES[what], devices[0]) if what in SHAPES else experts(args.experts, devices[0])
                if groups:
                    rows.append(measure(what, groups, devices, codec))
                    print(rows[-1], flush=True)
                    args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(not all(row["same_bytes"] for row in rows))


if __name__ == "__main__":
    main()
