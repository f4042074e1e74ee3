"""What an N-bit KV cache costs: KL to the 16-bit cache, perplexity, and each layer's signal-to-noise ratio.

    python bench/kv_quality.py MODEL [--text eval.txt] [--tokens 4096] [--variants glq-4 int4 …] [--json out.json]

Every window is one forward pass in which attention sees decoded keys and values only, each token's own included. int4
is asymmetric, with an fp16 scale and zero a token and head; int4-hadamard is the same after an orthonormal Hadamard
over the head. pages is glq without the keys' centre, as vLLM's pages are; plain has no factors for channels either, and
sink-4 is plain with a window's first four tokens as they are.
dB is -10·log10(‖x − x̂‖² / ‖x‖²) over a layer's vectors of the first window, of the codec alone, keys with their rotary
embedding.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from glq import GlqCache
from glq.calibration import read_text, windows
from glq.evaluation import log_probabilities
from glq.hf_integration import load
from glq.hub import load_tokenizer, resolve
from glq.kv.codec import kv_codec
from glq.rotation import hadamard

_CHUNK = 64  # positions whose logits are held at once

Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    rounding: Rounding  # of [batch, heads, tokens, head_dim]
    stored_bits: Callable[[int], float]  # of a channel, by head_dim
    glq_bits: int | None = None  # GlqCache itself is run
    centre: bool = True  # of keys, in GlqCache
    sink: int = 0  # tokens that stay as they are

    def cache(self, model: PreTrainedModel) -> Cache:
        if not self.glq_bits:
            return RoundedCache(self, model)
        return GlqCache(self.glq_bits, model=model, centre=self.centre)


class RoundedCache(DynamicCache):
    """Keeps keys and values as a rounding gives them back."""

    def __init__(self, variant: Variant, model: PreTrainedModel) -> None:
        super().__init__(config=model.config)
        self._variant = variant

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        sink, f = self._variant.sink, self._variant.rounding
        rounded = (torch.cat([x[..., :sink, :], f(x[..., sink:, :])], -2) for x in (key_states, value_states))
        return super().update(*rounded, layer_idx, *args, **kwargs)


def int4(x: Tensor) -> Tensor:
    low = x.amin(-1, keepdim=True).half().to(x.dtype)
    step = ((x.amax(-1, keepdim=True) - low) / 15).half().to(x.dtype).clamp_min(1e-7)
    return ((x - low) / step).round_().clamp_(0, 15) * step + low


def int4_hadamard(x: Tensor) -> Tensor:
    return hadamard(int4(hadamard(x, x.shape[-1])), x.shape[-1])


def glq(bits: int) -> Rounding:
    codec = kv_codec(bits)
    return lambda x: codec.decode(*codec.encode(x), x.dtype)


def variants() -> dict[str, Variant]:
    found = {f"glq-{b}": Variant(glq(b), kv_codec(b).stored_bits, b) for b in (4, 3, 2)}
    found |= {f"glq-{b}-pages": Variant(glq(b), kv_codec(b).stored_bits, b, centre=False) for b in (4, 3, 2)}
    found |= {f"glq-{b}-plain": Variant(glq(b), kv_codec(b).stored_bits) for b in (4, 3, 2)}
    found |= {f"glq-{b}-sink-4": Variant(glq(b), kv_codec(b).stored_bits, sink=4) for b in (4, 2)}
    integers = {"int4": int4, "int4-hadamard": int4_hadamard}
    return found | {name: Variant(f, lambda d: 4 + 32 / d) for name, f in integers.items()}


class Tally:
    """Sums over predicted tokens."""

    def __init__(self) -> None:
        self.tokens, self.nll, self.kl, self.agree = 0, 0.0, 0.0, 0

    def add(self, log_p: Tensor, log_q: Tensor, target: Tensor) -> None:
        self.tokens += len(target)
        self.nll -= log_q.gather(1, target).sum().item()
        self.kl += (log_p.exp() * (log_p - log_q)).sum().item()
        self.agree += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()

    def row(self) -> dict[str, float]:
        perplexity = torch.tensor(self.nll / self.tokens, dtype=torch.float64).exp().item()
        return {"perplexity": perplexity, "kl": self.kl / self.tokens, "top1": self.agree / self.tokens}


def compare(model: PreTrainedModel, window: Tensor, chosen: dict[str, Variant], tallies: dict[str, Tally]) -> None:
    """One window [ctx] with every cache; the 16-bit one is tallied under 'none'."""
    caches = {"none": DynamicCache(config=model.config)} | {name: v.cache(model) for name, v in chosen.items()}
    states = {
        name: model.base_model(window[None], past_key_values=cache).last_hidden_state[0, :-1]
        for name, cache in caches.items()
    }
    for start in range(0, len(window) - 1, _CHUNK):
        part = slice(start, start + _CHUNK)
        target = window[1:][part, None]
        log_p = log_probabilities(model, states["none"][part])
        for name, hidden in states.items():
            log_q = log_p if name == "none" else log_probabilities(model, hidden[part])
            tallies[name].add(log_p, log_q, target)


def layer_ratios(model: PreTrainedModel, window: Tensor, variant: Variant) -> list[tuple[float, float]]:
    """dB of each layer's keys and values. Layers with a sliding window keep theirs: the last tokens of the window."""
    cache = DynamicCache(config=model.config)
    model.base_model(window[None], past_key_values=cache)

    def ratio(x: Tensor) -> float:
        return -10 * torch.log10((variant.rounding(x) - x).square().sum() / x.square().sum()).item()

    return [(ratio(layer.keys), ratio(layer.values)) for layer in cache.layers]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variants", nargs="*", choices=variants(), help="default: all")
    parser.add_argument("--layers", type=int, default=4, help="bits of the table by layer; 0: no table")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = load(args.model, device=args.device)
    tokenizer = load_tokenizer(resolve(args.model))
    content = read_text(args.text, default="evaluation")
    ids = windows(tokenizer, content, max(1, args.tokens // args.ctx), args.ctx, spread=False).to(model.device)
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    chosen = {name: v for name, v in variants().items() if not args.variants or name in args.variants}
    found: dict[str, object] = {"head_dim": head_dim, "tokens": ids.numel() - len(ids)}
    if args.layers:
        found["layers"] = layer_ratios(model, ids[0], variants()[f"glq-{args.layers}"])
        for i, (keys, values) in enumerate(found["layers"]):
            print(f"| {i} | {keys:.2f} | {values:.2f} |", flush=True)
        print(f"least: {min(map(min, found['layers'])):.2f} dB", flush=True)
    tallies = {name: Tally() for name in ("none", *chosen)}
    for window in ids:
        compare(model, window, chosen, tallies)
    bits = {"none": 16.0} | {name: v.stored_bits(head_dim) for name, v in chosen.items()}
    found["rows"] = {name: {"bits": bits[name]} | tally.row() for name, tally in tallies.items()}
    for name, row in found["rows"].items():
        print(f"| {name} | {row['bits']:.3f} | {row['perplexity']:.3f} | {row['kl']:.5f} | {row['top1']:.2%} |")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
