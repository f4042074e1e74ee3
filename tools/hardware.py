"""Write the tables of docs/hardware.md: GPUs by their data sheets, and the bound that memory sets to decoding.

Usage: python tools/hardware.py [--check]
"""

import math
import sys
from pathlib import Path

from glq.gpus import COMPILED, GPUS, RUN, TIMED, bound
from glq.packed import packed_shapes

PAGE = Path(__file__).parent.parent / "docs" / "hardware.md"
LAYERS, HIDDEN, INNER, KV, VOCABULARY = 32, 4096, 14336, 1024, 128256  # Llama-3-8B
MATRICES = [(HIDDEN, HIDDEN), (KV, HIDDEN), (KV, HIDDEN), (HIDDEN, HIDDEN), (INNER, HIDDEN), (INNER, HIDDEN)]
MATRICES.append((HIDDEN, INNER))
# weights → tokens/s of one sequence on an H100 SXM: docs/benchmarks.md (transformers), docs/serving.md (vLLM)
MEASURED = {
    "bf16": (108, 161),
    "4 bits": (337, 331),
    "2 bits": (380, 394),
    "4 bits, lm_head, too": (None, 372),
}


def matrix_bytes(codec: str, rows: int, cols: int) -> int:
    """Codes, scales and signs, as stored."""
    shapes = packed_shapes(codec, rows, cols)
    return math.prod(shapes["codes"]) + 2 * rows + math.prod(shapes["signs"])


def read_bytes(weights: str) -> int:
    """Bytes of weights that one token reads: all layers, norms and the lm_head; of the embeddings one row."""
    norms = 2 * HIDDEN * (2 * LAYERS + 1)
    head = 2 * VOCABULARY * HIDDEN
    if weights == "bf16":
        return norms + head + LAYERS * sum(2 * rows * cols for rows, cols in MATRICES)
    codec = f"trellis-{weights[0]}"
    if "lm_head" in weights:
        head = matrix_bytes("trellis-4", VOCABULARY, HIDDEN)
    return norms + head + LAYERS * sum(matrix_bytes(codec, rows, cols) for rows, cols in MATRICES)


def gpu_table() -> str:
    kinds = ["bf16", "4 bits", "3 bits", "2 bits"]
    lines = [
        "| GPU | | memory | GB/s | bf16 | 4 bits | 3 bits | 2 bits | glq's kernels there |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for gpu in GPUS:
        fits = [read_bytes(k) + 2 * VOCABULARY * HIDDEN < 0.9e9 * gpu.gb for k in kinds]
        cells = [
            f"{bound(gpu.gbps, read_bytes(k)):.0f}" if f else "too large" for k, f in zip(kinds, fits, strict=True)
        ]
        state = "compiled only"
        if gpu.arch in RUN:
            state = "run and timed" if gpu.name in TIMED else "as on the H100 SXM, not run"
        assert gpu.arch in COMPILED
        lines.append(f"| {gpu.name} | {gpu.arch} | {gpu.gb} GB | {gpu.gbps:,} | {' | '.join(cells)} | {state} |")
    return "\n".join(lines)


def share_table() -> str:
    h100 = next(gpu for gpu in GPUS if gpu.name == "H100 SXM")
    lines = [
        "| weights | bytes a token reads | bound | transformers, measured | | vLLM, measured | |",
        "|---|---|---|---|---|---|---|",
    ]
    for weights, figures in MEASURED.items():
        most = bound(h100.gbps, read_bytes(weights))
        cells = [f"{f} | {f / most:.0%}" if f else " | " for f in figures]
        lines.append(f"| {weights} | {read_bytes(weights) / 1e9:.2f} GB | {most:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def filled(page: str) -> str:
    """The page with its tables made anew."""
    for name, table in (("gpus", gpu_table()), ("share", share_table())):
        begin, end = f"<!-- {name}: tools/hardware.py -->\n", f"\n<!-- /{name} -->"
        head, _, rest = page.partition(begin)
        page = head + begin + "\n" + table + "\n" + end + rest.partition(end)[2]
    return page


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        sys.exit(0 if page == filled(page) else "docs/hardware.md: run tools/hardware.py")
    PAGE.write_text(filled(page), encoding="utf-8")
