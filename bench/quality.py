"""KL and perplexity over stored bits: this library's codecs, its ablations, and the peers on the same text.

    python bench/quality.py MODEL OUT --calibration calib.txt --text eval.txt [--variants trellis-2 trellis-2-tuned …]

Every variant is quantized, checked (stored bits as asked for, finite logits) and scored; OUT gets quality.json,
quality.md and quality.png, after each variant, and finished variants are not run again. The peers' figures
(bench/peers.json) were taken on SmolLM2-135M-Instruct and are drawn for that model alone.
"""

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import glq
from glq.allocation import Plan, allocate
from glq.codecs import DEFAULT_CODECS, get_codec
from glq.sensitivity import Group, measure

PEERS = json.loads((Path(__file__).parent / "peers.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Variant:
    """A codec for all layers, or a mixed rate; what is added to it and what is taken away."""

    name: str
    settings: glq.Settings
    mixed: bool = False
    tuned: bool = False
    without: str = ""  # "rotation", "LDLQ" or nothing

    @contextlib.contextmanager
    def ablation(self) -> Any:
        """The library without a part of itself."""
        if self.without == "rotation":
            with patch("glq.rounder.block_width", lambda _: 1):
                yield
        elif self.without == "LDLQ":
            with patch("glq.rounding.feedback", lambda m: torch.eye(len(m), device=m.device)):
                yield
        else:
            yield


def variants() -> list[Variant]:
    codecs = [*DEFAULT_CODECS.values(), "e8-1.5", "e8-2", "nested-3", "nested-3.5", "nested-4"]
    uniform = {name: glq.Settings(bits=get_codec(name).bits, codec=name) for name in codecs}
    found = [Variant(name, settings) for name, settings in uniform.items()]
    found += [Variant(f"{name}-tuned", uniform[name], tuned=True) for name in ("trellis-2", "trellis-3", "trellis-4")]
    found += [Variant(f"mixed-{b:g}", glq.Settings(bits=b), mixed=True) for b in (2, 2.25, 2.5, 3, 3.5)]
    found += [Variant(f"mixed-{b:g}-tuned", glq.Settings(bits=b), mixed=True, tuned=True) for b in (2, 3)]
    ablated = ("trellis-2", "trellis-4", "e8-2", "nested-4")
    found += [Variant(f"{n}-no-{w}", uniform[n], without=w) for n in ablated for w in ("rotation", "LDLQ")]
    found.append(Variant("whole-model-4", glq.Settings(bits=4, embeddings=4, head=4)))
    return found


class Bench:
    """Quantizes, checks and scores variants; what mixed ones need to know of the model is measured once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args

    @cached_property
    def _groups(self) -> Sequence[Group]:
        if self._args.measured:
            return Plan.read(self._args.measured).groups
        return measure(self._args.model, glq.Settings(), calibration=self._args.calibration, device=self._args.device)

    def run(self, variant: Variant) -> dict[str, Any]:
        args, settings = self._args, variant.settings
        plan = allocate(self._groups, settings.bits) if variant.mixed else None
        tuning = glq.TuneSettings() if variant.tuned else None
        with tempfile.TemporaryDirectory() as folder, variant.ablation():
            out = Path(folder) / "out"
            start = time.monotonic()
            result = glq.quantize(
                args.model, out, settings, plan=plan, tuning=tuning, calibration=args.calibration, device=args.device
            )
            seconds = time.monotonic() - start
            stored = glq.inspect(out).bits
            assert abs(stored - settings.bits) < 0.05, f"{variant.name} stores {stored} bits"
            _, score = glq.evaluate(args.model, [out], text=args.text, device=args.device)
            assert score.nonfinite == 0, f"{variant.name} has logits that are not finite"
        figures = {"bits": stored, "perplexity": score.perplexity, "kl": score.kl, "top1": score.top1}
        return {"name": variant.name, **figures, "seconds": seconds, "tuned_kl": result.tuned}


def write(rows: list[dict[str, Any]], out: Path, peers: list[dict[str, Any]]) -> None:
    """The table, and the plot."""
    lines = ["| | stored bits | perplexity | KL | top-1 | s |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda r: (r["bits"], r["kl"])):
        lines.append(
            f"| {row['name']} | {row['bits']:.3f} | {row['perplexity']:.2f} | {row['kl']:.4f} | {row['top1']:.1%} "
            f"| {row['seconds']:.0f} |"
        )
    lines += [
        f"| {p['name']} | {p['bits']:.2f} | {p['perplexity']:.2f} | {p['kl']:.4f} | {p['top1']:.1%} | |" for p in peers
    ]
    (out / "quality.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    for group, marker in ((rows, "o"), (peers, "x")):
        if group:
            axes.scatter([r["bits"] for r in group], [r["kl"] for r in group], marker=marker)
        for r in group:
            axes.annotate(r["name"], (r["bits"], r["kl"]), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set(xlabel="stored bits a weight", ylabel="KL to the original, nats a token", yscale="log")
    figure.savefig(out / "quality.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--measured", type=Path, help="a plan of `glq plan`, instead of measuring for mixed rates")
    parser.add_argument("--variants", nargs="*", help="by name; default: all")
    args = parser.parse_args()
    chosen = {v.name: v for v in variants()}
    if wrong := set(args.variants or ()) - chosen.keys():
        parser.error(f"no such variants: {', '.join(sorted(wrong))}; there are {', '.join(chosen)}")
    args.out.mkdir(parents=True, exist_ok=True)
    record = args.out / "quality.json"
    rows = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else []
    peers = PEERS if "smollm2-135m" in str(args.model).lower() else []
    bench = Bench(args)
    for name in args.variants or chosen:
        if name in {row["name"] for row in rows}:
            continue
        rows.append(bench.run(chosen[name]))
        print(json.dumps(rows[-1]), flush=True)
        record.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        write(rows, args.out, peers)


if __name__ == "__main__":
    main()
