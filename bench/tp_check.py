"""Whether a checkpoint gives on several tensor-parallel ranks what it gives on one, in vLLM: tokens, log-probs, bytes.

    python bench/tp_check.py OUT.json [DIR …] [--tp 2] [--new 64]

Without a directory it makes a model of Gemma-3-270M's shape with random weights, and quantizes it with 4 and 2 bits for
--tp ranks; the original is compared, too, since bf16 alone is not the same on two ranks. Every engine has a process of
its own, and all start at once. A token that differs has to be a tie: its log-prob on one rank within --within of the
best one's.
Exit code 1 if anything differs by more, or a GPU holds other bytes than `glq info --tp` says, by more than 3%.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

GEMMA = {
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
WORDS = 300
EMBEDDINGS = 0.12  # standard deviation: logits of three
PROMPTS, LENGTH = 8, 24


def make_model(folder: Path, layers: int, vocabulary: int) -> None:
    """Random weights, of such sizes that neither the token itself nor chance decides which one is next."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = GEMMA | {"num_hidden_layers": layers, "vocab_size": vocabulary, "initializer_range": EMBEDDINGS}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes))
    for name, weight in model.named_parameters():
        if "layernorm" in name and "post_" in name:  # what a layer adds: all of them together six times the embedding
            weight.data.fill_(6 * EMBEDDINGS * (GEMMA["hidden_size"] / (2 * layers)) ** 0.5 - 1)
    model.to(torch.bfloat16).save_pretrained(folder)
    words = {"<s>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)


def make_checkpoints(folder: Path, args: argparse.Namespace) -> list[Path]:
    """The model, and its checkpoints."""
    import torch

    import glq

    make_model(folder / "original", args.layers, args.vocabulary)
    picks = torch.randint(0, WORDS, (12_000,), generator=torch.Generator().manual_seed(1)).tolist()
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in picks), encoding="utf-8")
    made = [folder / "original"]
    for bits in args.bits:
        settings = glq.Settings(bits, tokens=2048, ctx=256, tensor_parallel=args.tp)
        made.append(glq.quantize(made[0], folder / f"{bits}-bits", settings, calibration=folder / "text.txt").path)
    return made


def weight_bytes(worker: Any) -> int:
    """Of all parameters on a rank, each counted once."""
    model = worker.get_model()
    return sum(p.numel() * p.element_size() for p in {p.data_ptr(): p for p in model.parameters()}.values())


def answer(model: Path, ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    """What an engine in this process writes, with the log-probs of the likeliest tokens, and what its ranks hold."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    cuda = bool(current_platform.is_cuda())
    llm = LLM(
        str(model),
        dtype=args.dtype or ("bfloat16" if cuda else "float32"),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=PROMPTS,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.05,  # as much has to be free
        kv_cache_memory_bytes=2**29,
        tensor_parallel_size=ranks,
        disable_custom_all_reduce=args.nccl,
        **({"distributed_executor_backend": "mp"} if ranks > 1 else {}),
    )
    ids = torch.randint(2, WORDS + 2, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(temperature=0, max_tokens=args.new, ignore_eos=True, logprobs=5, detokenize=False)
    requests = llm.generate([{"prompt_token_ids": row} for row in ids], params, use_tqdm=False)
    outputs = [request.outputs[0] for request in requests]
    logprobs = [[{str(t): e.logprob for t, e in entry.items()} for entry in output.logprobs] for output in outputs]
    held = llm.collective_rpc(weight_bytes) if cuda else None  # vLLM keeps others of its own on a CPU
    return {"tokens": [list(output.token_ids) for output in outputs], "logprobs": logprobs, "weight_bytes": held}


def compare(one: dict[str, Any], many: dict[str, Any]) -> dict[str, Any]:
    """How far the answers on one and on several ranks lie apart, up to the first token that differs in each.

    gap: how much less likely such a token was on one rank than the best; infinite if it was not among the five best.
    """
    worst, gap, equal, total = 0.0, 0.0, 0, 0
    for tokens, others, mine, theirs in zip(
        one["tokens"], many["tokens"], one["logprobs"], many["logprobs"], strict=True
    ):
        total += len(tokens)
        for a, b, p, q in zip(tokens, others, mine, theirs, strict=True):
            if a != b:
                gap = max(gap, p[str(a)] - p.get(str(b), -float("inf")))
                break
            equal += 1
            worst = max(worst, abs(p[str(a)] - q[str(b)]))
    return {"equal_tokens": equal, "tokens": total, "worst_logprob": worst, "gap": gap}


def expected_bytes(model: Path, ranks: int) -> list[int] | None:
    from glq.vllm_integration.shares import checkpoint_shares

    if "quantization_config" not in json.loads((model / "config.json").read_text(encoding="utf-8")):
        return None
    return [share.total for share in checkpoint_shares(model, ranks)]


def check(model: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One model on one rank and on several."""
    environment = os.environ | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # to send functions to ranks

    def ask(ranks: int) -> dict[str, Any]:
        part = folder / f"{model.name}-{ranks}.json"
        options = ["--new", args.new, "--one", ranks, *(["--nccl"] if args.nccl else [])]
        options += ["--dtype", args.dtype] if args.dtype else []
        command = [sys.executable, __file__, part, model, *options]
        subprocess.run([str(word) for word in command], env=environment, check=True)
        return json.loads(part.read_text(encoding="utf-8"))

    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(ask, (1, args.tp)))
    row = {"model": model.name, **compare(*answers)}
    row["weight_bytes"], row["expected_bytes"] = answers[1]["weight_bytes"], expected_bytes(model, args.tp)
    held = zip(row["weight_bytes"] or (), row["expected_bytes"] or (), strict=False)
    row["good"] = row["gap"] <= args.within and all(abs(a - b) <= 0.03 * b for a, b in held)
    return row


def main() -> None:
    here = Path(__file__).resolve().parent
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != here]  # transformers would import kernels.py from there
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--bits", type=float, nargs="*", default=[4, 2])
    parser.add_argument("--layers", type=int, default=GEMMA["num_hidden_layers"])
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--dtype", help="bfloat16 on a GPU and float32 on a CPU, if not given")
    parser.add_argument("--within", type=float, default=0.2, help="log-probs by which a token may miss the best")
    parser.add_argument("--nccl", action="store_true", help="no sums over ranks but NCCL's")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.out.write_text(json.dumps(answer(args.models[0], args.one, args)), encoding="utf-8")
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        models = args.models or make_checkpoints(Path(folder), args)
        with ThreadPoolExecutor() as pool:  # all engines start at the same time
            for row in pool.map(lambda model: check(model, Path(folder), args), models):
                rows.append(row)
                print(row, flush=True)
                args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(not all(row["good"] for row in rows))


if __name__ == "__main__":
    main()
