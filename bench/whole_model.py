"""What it costs to quantize embeddings and lm_head, too: the decoder alone at 4 bits, and the whole model at 4.0.

    python bench/whole_model.py MODEL OUT [--calibration calib.txt] [--text eval.txt] [--device cuda]

For models whose embeddings are much of them, such as Gemma-3-270M. Bits are those that the files store, scales and
signs included; to keep the whole model within 4.0, gate and up of some blocks take 3.75. OUT gets whole_model.json,
and the checkpoints. The last line says how the whole model compares with the decoder alone.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import glq
from glq.pipeline import open_model

BITS = 4.0
WHOLE = {"embeddings": 4, "head": 4}


def within(model: Path, bits: float) -> tuple[tuple[str, str], ...]:
    """Exceptions for gate and up of every other block, and more, so that the whole model stores no more than `bits`."""
    source, _ = open_model(model, glq.Settings(**WHOLE))
    tables = {name: source.module(name).weight.shape for name in {source.embeddings, source.head}}
    if source.tied:
        tables.pop(source.head)
    shapes = [tuple(shape) for shape in tables.values()]
    layers = [
        m.weight.shape for b in source.blocks for n, m in source.module(b).named_modules() if hasattr(m, "weight")
    ]
    shapes += [tuple(shape) for shape in layers if len(shape) == 2]
    weights = sum(rows * cols for rows, cols in shapes)
    spare = (bits - 4) * weights - sum(16 * rows + cols for rows, cols in shapes)  # scales and signs
    chosen: list[tuple[str, str]] = []
    count = len(source.blocks)
    for i in [*range(1, count, 2), *range(0, count, 2)]:
        if spare >= 0:
            break
        for key in ("gate_proj", "up_proj"):
            name = f"{source.blocks[i]}.mlp.{key}"
            rows, cols = source.module(name).weight.shape
            spare += rows * cols / 4
            chosen.append((name, "trellis-3.75"))
    return tuple(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, help="of calibration")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    variants: dict[str, dict[str, Any]] = {
        "decoder": {},
        "whole": WHOLE,
        "whole-4.0": WHOLE | {"layers": within(args.model, BITS)},
    }
    rows = []
    for name, options in variants.items():
        out, start = args.out / name, time.monotonic()
        if not (out / "config.json").is_file():
            settings = glq.Settings(bits=4, tokens=args.tokens, **options)
            glq.quantize(args.model, out, settings, calibration=args.calibration, device=args.device)
        rows.append({"name": name, "bits": glq.inspect(out).bits, "seconds": time.monotonic() - start})
        print(json.dumps(rows[-1]), flush=True)
    reference, *scores = glq.evaluate(args.model, [args.out / n for n in variants], text=args.text, device=args.device)
    print(f"{reference.tokens} tokens; original: perplexity {reference.perplexity:.3f}, {reference.weight_bytes} bytes")
    for row, score in zip(rows, scores, strict=True):
        size = score.weight_bytes / reference.weight_bytes
        row |= {"perplexity": score.perplexity, "kl": score.kl, "kl_p99": score.kl_p99, "top1": score.top1}
        row |= {"size": size, "of_decoder": score.kl / scores[0].kl}
        print(
            "{name:10} {bits:.4f} bits  perplexity {perplexity:.3f}  KL {kl:.4f}  top-1 {top1:.1%}  size {size:.3f}  "
            "KL of decoder's {of_decoder:.2f}".format(**row)
        )
    (args.out / "whole_model.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
