"""Checkpoints of upstream glq on a GPU: that they decode to the CPU's bits, and what a product costs beside bf16.

    python bench/upstream.py OUT.json [--fixtures DIR] [--size 4096]

Checks come first: matrices of every kind of codes decode on the GPU to what they do on the CPU (1e-6; `bits_equal` says
whether bit for bit), and products are as near to them as their type allows. With --fixtures, models in DIR generate
tokens with and without a static cache.
"""

import argparse
import json
from pathlib import Path

import torch

from glq.upstream import codebooks, trellis
from glq.upstream.format import E8P, E81B, SHELL
from glq.upstream.matrix import Matrix, Part
from glq.upstream.ops import multiply

CPU, GPU = torch.device("cpu"), torch.device("cuda")
KINDS = {"e8_shell 2": [SHELL], "e8_shell 4": [SHELL, SHELL], "e8p 2": [E8P], "e8p 3": [E8P, E81B], "e8p 4": [E8P, E8P]}
KINDS |= {"3inst 2": ["3inst2"], "3inst 4": ["3inst4"], "hyb 2": ["hyb2"], "hyb 4": ["hyb4"]}


def part(kind, size, weight):
    """Random codes of a square matrix, on the CPU."""
    codes = {SHELL: ((size, size // 8), torch.int16), E8P: ((size // 16, size // 64, 8, 4), torch.int64)}
    codes |= {E81B: ((size, size // 64), torch.int64)}
    tables = {SHELL: codebooks.shell_table, E8P: codebooks.e8p_table, E81B: codebooks.e81b_table}
    if kind in tables:
        shape, dtype = codes[kind]
        table = tables[kind]().on(CPU)
    else:
        kind, k = kind[:-1], int(kind[-1])
        shape, dtype = (size * size // 256, 16 * k), torch.int16
        table = trellis.computed_table().on(CPU) if kind == "3inst" else torch.randn(512, 2).half()
    info = torch.iinfo(dtype)
    drawn = torch.randint(info.min, info.max, shape, dtype=dtype)
    return Part(kind, drawn, table, weight)


def matrix(kinds, size):
    parts = [part(kind, size, torch.tensor(0.3) if i else None) for i, kind in enumerate(kinds)]
    su, sv = (torch.randint(2, (size,)).half() * 2 - 1 for _ in range(2))
    return Matrix(tuple(parts), su, sv, torch.tensor(0.02))


def on_gpu(m):
    def move(tensor):
        return None if tensor is None else tensor.to(GPU)

    parts = tuple(Part(p.kind, move(p.codes), move(p.table), move(p.weight)) for p in m.parts)
    return Matrix(parts, move(m.su), move(m.sv), move(m.scale))


def check(name, small):
    """GPU and CPU of a small matrix: equal weights, products within their type's rounding."""
    size = len(small.su)
    weight, gpu = small.dequantize(size, size), on_gpu(small)
    decoded = gpu.dequantize(size, size).cpu()
    x = torch.randn(5, size)
    worst = 0.0
    for dtype in (torch.float16, torch.bfloat16):
        y = multiply(x.to(GPU, dtype), gpu, size).float().cpu()
        expected = x.to(dtype).float() @ weight.T
        worst = max(worst, ((y - expected).norm() / expected.norm()).item() / torch.finfo(dtype).eps)
    assert (decoded - weight).abs().max() <= 1e-6 * weight.abs().max(), f"{name}: decoded weights are not the CPU's"
    assert worst < 2, f"{name}: products are off by {worst:.1f} roundings"
    return worst, torch.equal(decoded, weight)


def microseconds(step):
    """The median of 20 calls."""
    for _ in range(3):
        step()
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return sorted(times)[10]


def generated(folder):
    """Whether models generate the same with a static cache, by name."""
    from transformers import AutoModelForCausalLM

    import glq.hf_integration  # noqa: F401

    found = {}
    for path in sorted(p.parent for p in Path(folder).glob("*/config.json")):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16, device_map="cuda")
        ids = torch.tensor([[3, 4, 5]], device=GPU)
        options = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True}
        dynamic = model.generate(ids, **options)
        static = model.generate(ids, cache_implementation="static", **options)
        found[path.name] = torch.equal(dynamic, static)
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--fixtures")
    parser.add_argument("--size", type=int, default=4096)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name, kinds in KINDS.items():
        roundings, bits_equal = check(name, matrix(kinds, 320))
        large = on_gpu(matrix(kinds, args.size))
        row = {"codes": name, "roundings": round(roundings, 2), "bits_equal": bits_equal}
        for tokens in (1, 512):
            x = torch.randn(tokens, args.size, device=GPU, dtype=torch.bfloat16)
            row[f"us_{tokens}"] = round(microseconds(lambda x=x, w=large: multiply(x, w, args.size)), 1)
        rows.append(row)
        print(row, flush=True)
    weight = torch.randn(args.size, args.size, device=GPU, dtype=torch.bfloat16)
    plain = {"codes": "bf16"}
    for tokens in (1, 512):
        x = torch.randn(tokens, args.size, device=GPU, dtype=torch.bfloat16)
        plain[f"us_{tokens}"] = round(microseconds(lambda x=x: x @ weight.T), 1)
    print(plain)
    result = {"gpu": torch.cuda.get_device_name(), "size": args.size, "rows": [*rows, plain]}
    if args.fixtures:
        result["static_cache_alike"] = generated(args.fixtures)
        print(result["static_cache_alike"])
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
