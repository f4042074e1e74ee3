"""What `--fit` counts beside what a GPU then holds: three sizes each of SmolLM2-135M's and Gemma-3-270M's shapes.

    python bench/fit.py OUT.json [--model DIR ...] [--tokens 2048]

Random weights of the two shapes, unless directories are given. A checkpoint is made for each amount of memory, at the
rates that --fit chooses; a process of its own loads it, reads a prompt of all but 7 tokens of the context, writes 8,
and says what PyTorch had allocated at most.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from glq.fitting import fit
from glq.pipeline import Settings
from glq.recipe import quantize

CASES = {  # MB of memory, tokens of context
    "smollm2-135m": [(560, 8192), (430, 8192), (215, 2048)],
    "gemma3-270m": [(1100, 8192), (450, 4096), (420, 2048)],
}
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
}
GEMMA3 = {
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "tie_word_embeddings": True,
}


def make(name: str, path: Path) -> Path:
    """A random model of this shape, with a tokenizer of 300 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    own = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
    torch.manual_seed(0)
    if name.startswith("smollm2"):
        model = LlamaForCausalLM(LlamaConfig(**SMOLLM2 | own))
    else:
        model = Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA3 | own))
    model.to(torch.bfloat16).save_pretrained(path)
    words = {"<s>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(300)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(path)
    return path


def measure(path: Path, context: int, kv_bits: int | None) -> dict[str, int]:
    """Bytes, by what torch says; for a process of its own."""
    import glq
    from glq import GlqCache

    free, _ = torch.cuda.mem_get_info()
    model = glq.load(path, device="cuda")
    torch.cuda.synchronize()
    weights = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(2, 300, (1, context - 7), device="cuda")
    cache = None if kv_bits is None else GlqCache(kv_bits, model=model)
    model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=8, max_new_tokens=8, past_key_values=cache)
    torch.cuda.synchronize()
    return {
        "weights": weights,
        "total": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "taken_of_card": free - torch.cuda.mem_get_info()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, nargs="*", help="directories whose names are those of CASES")
    parser.add_argument("--tokens", type=int, default=2048, help="of calibration")
    parser.add_argument("--kv-bits", type=int)
    parser.add_argument("--measure", nargs=2, metavar=("DIR", "CONTEXT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        found = measure(Path(arguments.measure[0]), int(arguments.measure[1]), arguments.kv_bits)
        arguments.out.write_text(json.dumps(found))
        return
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        words = " ".join(f"w{i * i % 300}" for i in range(40_000))
        (folder / "text.txt").write_text(words)
        for name, cases in CASES.items():
            given = [m for m in arguments.model or () if m.name == name]
            model, text = (given[0], None) if given else (make(name, folder / name), folder / "text.txt")
            for megabytes, context in cases:
                rows.append(one(model, text, megabytes, context, arguments, folder / f"{name}-{megabytes}"))
                show(rows[-1])
    arguments.out.write_text(json.dumps(rows, indent=2) + "\n")
    worst = max(abs(row["off"]) for row in rows)
    print(f"worst {worst:.1%}: {'within' if worst <= 0.05 else 'NOT within'} 5%")


def one(
    model: Path, text: Path | None, megabytes: int, context: int, arguments: argparse.Namespace, out: Path
) -> dict[str, object]:
    fitted = fit(model, megabytes * 10**6, context, arguments.kv_bits)
    settings = fitted.settings(Settings(tokens=arguments.tokens, ctx=512))
    quantize(model, out, settings, calibration=text)
    kv = [] if arguments.kv_bits is None else ["--kv-bits", str(arguments.kv_bits)]
    file = out / "measured.json"
    command = [sys.executable, __file__, str(file), "--measure", str(out), str(context), *kv]
    subprocess.run(command, check=True)
    found, counted = json.loads(file.read_text()), fitted.best.footprint
    rates = {"bits": fitted.best.bits, "outside": fitted.best.outside}
    case = {"model": model.name, "memory": megabytes * 10**6, "context": context, **rates}
    return (
        case
        | {"counted": vars(counted) | {"total": counted.total}, "measured": found}
        | {"off": counted.total / found["total"] - 1}
    )


def show(row: dict) -> None:
    counted = {key: n / 1e6 for key, n in row["counted"].items()}
    found = {key: n / 1e6 for key, n in row["measured"].items()}
    parts = " + ".join(f"{counted[key]:.1f}" for key in ("weights", "kv", "activations"))
    print(
        f"{row['model']:13} {row['memory'] / 1e6:5.0f} MB, {row['context']:5} tokens → {row['bits']:4} bits, outside "
        f"{row['outside'] or 16:2}: weights + KV + activations counted {parts} = {counted['total']:.1f} MB, measured "
        f"{found['total']:.1f} (weights {found['weights']:.1f}) {row['off']:+.1%}; reserved {found['reserved']:.0f}, "
        f"of the card {found['taken_of_card']:.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
