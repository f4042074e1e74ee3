"""Train a trellis table on N(0, 1) by Lloyd's algorithm: how glq/codecs/trellis.safetensors was made.

    python tools/train_trellis.py --bits 3 --table-bits 9 out.safetensors

The shipped tables are frozen: they are part of the file format, and this makes others, as good but not the same.
"""

import argparse
from pathlib import Path
from statistics import NormalDist

import torch
from safetensors.torch import save_file

from glq.codecs.trellis import Trellis, entry_and_signs
from glq.codecs.viterbi import best_states

PAIRS = 1024  # of a circle: long, so that closing it costs nothing
ROUNDS = 28
WEIGHTS = 262_144  # a round, new ones every time


def initial(table_bits: int, bits: float, seed: int) -> torch.Tensor:
    """Quantiles of |N(0, 1)|, paired at random, with the energy that codewords of this rate have."""
    n = 1 << table_bits
    generator = torch.Generator().manual_seed(seed)
    quantiles = torch.tensor([NormalDist().inv_cdf(0.5 + (i + 0.5) / (2 * n)) for i in range(n)])
    pairs = torch.stack([quantiles[torch.randperm(n, generator=generator)] for _ in range(2)], 1)
    return pairs * (1 - 4.0**-bits) ** 0.5


def train(bits: float, table_bits: int, seed: int) -> torch.Tensor:
    """[2^table_bits, 2] fp32."""
    own = Trellis("", round(16 * bits), table_bits, 0).step_bits
    entry, signs = entry_and_signs(table_bits)
    table = initial(table_bits, bits, seed)
    for i in range(ROUNDS):
        x = torch.randn(WEIGHTS // 2 // PAIRS, PAIRS, 2, generator=torch.Generator().manual_seed(1000 + i))
        values = table.half().float()[entry] * signs
        chosen = best_states(x, values, own).flatten()
        mse = (x.view(-1, 2) - values[chosen]).square().mean().item()
        print(f"round {i + 1}: MSE {mse:.5f}", flush=True)
        target = x.view(-1, 2) * signs[chosen]
        total = torch.zeros_like(table).index_add_(0, entry[chosen], target)
        count = torch.bincount(entry[chosen], minlength=len(table))[:, None]
        table = ((total + 8 * table) / (count + 8)).abs()  # 8: few samples move an entry only a little
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, required=True)
    parser.add_argument("--table-bits", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    table = train(args.bits, args.table_bits, args.seed)
    save_file({f"trellis-{args.bits:g}": table.half().contiguous()}, args.out)


if __name__ == "__main__":
    main()
