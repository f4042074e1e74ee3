"""Tokens a second of `generate` with random weights of a Llama's shape, quantized and in bf16, both in CUDA graphs.

    python bench/generate.py OUT.json [--codecs trellis-4 …] [--batch 1] [--prompt 128] [--new 128] [--layers 32]
                                      [--compile] [--plain] [--profile]

--compile has transformers compile both models (Inductor, which captures graphs, too) in the place of our graphs. Both
models write from the same prompt into a static cache. The quantized model's layers are fused as those of a loaded one,
and so are the small operations between them; --plain times it without the latter, too. Before it is timed, its first
block's layers are checked against PyTorch's products with their dequantized weights, and the logits of fused steps
against those of plain ones. --profile prints which kernels a step's time goes to.

How it is timed: a logits processor, which generate calls once a token, reads a clock. generate has waited for the GPU
since the last time, so two readings are a step apart. The first steps, which are recorded, compiled and captured, do
not count, nor does what comes before and after the tokens; the difference of two lengths of generate had that twice.
The row is the median of several runs, beside the best one, a step's median, and the slowest step: one that is captured
again would be seen there. fused_kernels_used says whether the timed graph had the fused kernels, and if not, why.
"""

import argparse
import json
import time
import warnings
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, StaticCache

from glq.codecs import CODECS
from glq.fused import fuse
from glq.graphs import GraphedForward, decode_in_graphs
from glq.linear import QuantLinear
from glq.rotation import block_width

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
}


def dense_model(layers: int, device: str = "cuda", **changes: int) -> LlamaForCausalLM:
    """Random bf16 weights."""
    config = LlamaConfig(**LLAMA_3_8B | changes, num_hidden_layers=layers, eos_token_id=None)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model.to_empty(device=device)
    for name, p in model.named_parameters():
        p.data.fill_(1.0) if "norm" in name else p.data.normal_(std=0.02)
    width = config.head_dim
    inverse = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, width, 2, device=device) / width)
    model.model.rotary_emb.inv_freq.copy_(inverse)
    return model.eval()


def quantize_randomly(model: LlamaForCausalLM, codec: str) -> None:
    """Layers of random codes, whose weights have the size of the dense ones, in place of the decoder's; fused.

    Layers of one module that read as many channels have the same signs, as q/k/v and gate/up of a checkpoint have.
    """
    signs: dict[tuple[str, int], torch.Tensor] = {}
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear | QuantLinear):
            rows, cols = module.out_features, module.in_features
            layer = QuantLinear(cols, rows, codec, block_width(cols), device=model.device)
            layer.codes.random_(0, 256)
            source = "o_proj" if name.endswith("o_proj") else name.rpartition(".")[0]
            layer.signs.copy_(signs.setdefault((source, cols), torch.randint_like(layer.signs, 0, 256)))
            layer.scale.fill_(0.02)
            model.model.layers.set_submodule(name, layer)
    fuse(model)


@torch.no_grad()
def check(model: LlamaForCausalLM) -> None:
    """The layers of the first block, with one token and with many, against PyTorch's products."""
    block = model.model.layers[0]
    attention, mlp = block.self_attn, block.mlp
    for group in (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    ):
        for tokens in (1, 128):
            x = torch.randn(tokens, group[0].in_features, device=model.device, dtype=torch.bfloat16)
            for layer, y in [(layer, layer(x)) for layer in group]:
                dense = layer.dequantize(torch.bfloat16)
                exact = x.double() @ dense.weight.double().T
                error, plain = ((z.double() - exact).norm().item() for z in (y, dense(x)))
                assert error < 2 * plain + 0.003 * exact.norm().item(), (error, plain)


@torch.no_grad()
def check_steps(model: LlamaForCausalLM, batch: int, steps: int = 8) -> float:
    """How far logits of fused steps are from those of plain ones, relative to the latter; the graph is replayed."""
    ids = torch.randint(0, 1000, (batch, steps + 16), generator=torch.Generator().manual_seed(1)).to(model.device)

    def logits(fused: bool) -> Tensor:
        cache = StaticCache(config=model.config, max_cache_len=300)
        forward = GraphedForward(model.__call__, fused)
        model(input_ids=ids[:, :16], past_key_values=cache)
        found = []
        for at in range(16, 16 + steps):
            mask = (torch.arange(300, device=model.device) <= at).expand(batch, 1, 1, -1).contiguous()
            where = {"attention_mask": mask, "position_ids": torch.full_like(ids[:, :1], at)}
            step = forward(input_ids=ids[:, at : at + 1], past_key_values=cache, return_dict=True, **where)
            found.append(step.logits.float().clone())
        return torch.stack(found)

    plain, fused = logits(False), logits(True)
    return ((fused - plain).norm() / plain.norm()).item()


class Clock(LogitsProcessor):
    """Reads the time once a step; the first steps, in which much is made, do not count."""

    first = 8

    def __init__(self) -> None:
        self._times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._times.append(time.perf_counter())
        return scores

    @property
    def steps(self) -> list[float]:
        """Seconds of each."""
        times = self._times[self.first :]
        return [b - a for a, b in pairwise(times)]


class Forwards:
    """In the place of a model's get_compiled_call: knows the last one that generate decoded with."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._get = model.get_compiled_call
        self.last: Any = None
        model.get_compiled_call = self

    def __call__(self, compile_config: Any = None) -> Any:
        self.last = self._get(compile_config)
        return self.last


def speed(model: LlamaForCausalLM, batch: int, prompt: int, new: int, compiled: bool, runs: int = 4) -> dict[str, Any]:
    """New tokens a second, all sequences together, and what a step takes."""
    ids = torch.randint(0, 1000, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(model.device)
    cache = StaticCache(config=model.config, max_cache_len=prompt + new)  # one for all runs: nothing is compiled again
    settings: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    if compiled:
        settings["compile_config"] = CompileConfig()
    forwards = Forwards(model)

    def run() -> list[float]:
        cache.reset()
        clock = Clock()
        model.generate(ids, past_key_values=cache, logits_processor=LogitsProcessorList([clock]), **settings)
        return clock.steps

    run()
    steps = [run() for _ in range(runs)]
    means = sorted(mean(each) for each in steps)
    of_all = sorted(second for each in steps for second in each)
    found = {
        "tokens_per_second": batch / median(means),
        "best": batch / means[0],
        "worst": batch / means[-1],
        "step_us": round(1e6 * median(of_all)),
        "slowest_steps_us": [round(1e6 * second) for second in of_all[-3:]],
    }
    if isinstance(forwards.last, GraphedForward):
        found |= {"fused_kernels_used": forwards.last.is_fused, "remark": forwards.last.remark}
    del model.get_compiled_call
    return found


class Window(LogitsProcessor):
    """Profiles decoding steps, from the eighth on."""

    first, steps = 8, 24

    def __init__(self) -> None:
        self._calls = 0
        self.profile = profile(activities=[ProfilerActivity.CUDA])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._calls += 1
        if self._calls in (self.first, self.first + self.steps):
            torch.cuda.synchronize()
            (self.profile.start if self._calls == self.first else self.profile.stop)()
        return scores


def print_profile(model: LlamaForCausalLM, batch: int, prompt: int) -> None:
    """Microseconds of a step by kernel; how long the GPU does nothing, and where most of that is."""
    window = Window()
    cache = StaticCache(config=model.config, max_cache_len=prompt + 264)
    ids = torch.randint(0, 1000, (batch, prompt), device=model.device)
    count = window.first + window.steps + 2
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    model.generate(ids, past_key_values=cache, logits_processor=LogitsProcessorList([window]), **settings)
    events = [e for e in window.profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    if not events:
        print("the profiler sees no kernels here")
        return
    events.sort(key=lambda e: e.time_range.start)
    names: dict[str, list[float]] = {}
    end = events[0].time_range.start
    gaps: list[float] = []
    for e in events:
        names.setdefault(e.name, []).append(e.time_range.elapsed_us())
        gaps.append(max(0.0, e.time_range.start - end))
        end = max(end, e.time_range.end)
    wall, idle = end - events[0].time_range.start, sum(gaps)
    n = window.steps
    print(f"profiled step {wall / n:.0f} us, GPU idle {idle / n:.0f} us, {len(events) / n:.0f} kernels and copies")
    longest = sorted(gaps, reverse=True)[: 3 * n]
    print("  a step's longest gaps, us:", *(round(sum(longest[i * n : i * n + n]) / n) for i in range(3)))
    for name, times in sorted(names.items(), key=lambda item: -sum(item[1]))[:24]:
        print(f"  {sum(times) / n:8.1f} us {len(times) / n:6.1f} x {sum(times) / len(times):7.2f}  {name[:100]}")


def forget_compiled(model: LlamaForCausalLM) -> None:
    """What was compiled for other layers: guards would count each as a recompilation."""
    torch._dynamo.reset()
    model.__dict__.pop("_compiled_call", None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--codecs", nargs="*", choices=list(CODECS), default=["trellis-4", "trellis-3", "trellis-2"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("always", message="a kernel for|the decoding step")
    model = dense_model(args.layers)
    rows: list[dict[str, Any]] = []
    by = "torch.compile" if args.compile else "graphs"
    for name, fused in variants(args.codecs, args.plain):
        row: dict[str, Any] = {"weights": name, "by": by, "fused": fused and not args.compile}
        if name != "bf16" and (not rows or rows[-1]["weights"] != name):
            quantize_randomly(model, name)
            check(model)
        if row["fused"]:
            row["logits"] = check_steps(model, args.batch)
            if not row["logits"] < 0.1:
                print(f"WRONG: logits of fused steps are {row['logits']:.2g} from those of plain ones", flush=True)
        decode_in_graphs(model, fused)
        forget_compiled(model)
        sizes = (args.batch, args.prompt, args.new, args.compile)
        try:
            row |= speed(model, *sizes)
        except Exception as error:  # noqa: BLE001 (the other rows are worth having)
            print(f"FAILED: {error!r}; once more, with masks made ahead of the graphs", flush=True)
            decode_in_graphs(model, fused)
            model.__dict__.pop("create_masks_for_generate", None)
            row |= speed(model, *sizes)
        if row["fused"] and not row.get("fused_kernels_used"):
            print("NOT FUSED: this row's time is that of the model's own kernels", flush=True)
        row["of_bf16"] = row["tokens_per_second"] / (rows[0] if rows else row)["tokens_per_second"]
        rows.append(row)
        print(row, flush=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        if args.profile:
            decode_in_graphs(model, fused)
            print_profile(model, args.batch, args.prompt)


def variants(codecs: list[str], plain: bool) -> list[tuple[str, bool]]:
    """What is timed: weights, and whether the steps are fused."""
    return [("bf16", False), *((name, fused) for name in codecs for fused in ([False, True] if plain else [True]))]


if __name__ == "__main__":
    main()
