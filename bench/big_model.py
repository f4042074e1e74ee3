"""A Llama of random weights, of any size, as a model directory: to see what quantizing it takes in memory and time.

    python bench/big_model.py DIR --shape 3b
    python bench/big_model.py DIR --shape 3b --blocks 2     # the same with fewer decoder blocks

Written block by block, bf16, a file each: it takes no more memory than a block or the embeddings. Numbers are drawn on
a GPU where there is one. The tokenizer knows the words of the calibration text that glq ships.
"""

import argparse
import json
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

SHAPES = {  # hidden, intermediate, blocks, heads, key and value heads, vocabulary, tied
    "tiny": (256, 512, 6, 4, 2, 20480, True),
    "1b": (2048, 8192, 16, 32, 8, 128256, True),
    "3b": (3072, 8192, 28, 24, 8, 128256, True),
    "8b": (4096, 14336, 32, 32, 8, 128256, False),
    "70b": (8192, 28672, 80, 64, 8, 128256, False),
}


def config_of(shape: str, blocks: int | None) -> LlamaConfig:
    hidden, intermediate, count, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks or count,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )


def write_model(path: Path, config: LlamaConfig) -> int:
    """How many weights were written."""
    path.mkdir(parents=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    hidden, inside = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * hidden // config.num_attention_heads

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.bfloat16, device=device).mul_(0.02).cpu()

    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)}
    shapes |= {"self_attn.o_proj": (hidden, hidden), "mlp.down_proj": (hidden, inside)}
    shapes |= {"mlp.gate_proj": (inside, hidden), "mlp.up_proj": (inside, hidden)}
    norms = ("input_layernorm", "post_attention_layernorm")
    weight_map: dict[str, str] = {}
    total = 0

    def save(tensors: dict[str, Tensor], file: str) -> int:
        weight_map.update(dict.fromkeys(tensors, file))
        save_file(tensors, path / file, metadata={"format": "pt"})
        return sum(tensor.numel() for tensor in tensors.values())

    one = torch.ones(hidden, dtype=torch.bfloat16)
    for i in range(config.num_hidden_layers):
        tensors = {f"model.layers.{i}.{name}.weight": weight(*shape) for name, shape in shapes.items()}
        tensors |= {f"model.layers.{i}.{name}.weight": one.clone() for name in norms}
        total += save(tensors, f"model-block-{i:03}.safetensors")
    total += save(
        {"model.embed_tokens.weight": weight(config.vocab_size, hidden), "model.norm.weight": one},
        "model-embeddings.safetensors",
    )
    if not config.tie_word_embeddings:
        total += save({"lm_head.weight": weight(config.vocab_size, hidden)}, "model-head.safetensors")
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(path)
    return total


def write_tokenizer(path: Path, vocabulary: int) -> None:
    """Words of the text that glq ships, the most frequent ones if there are too many."""
    text = files("glq").joinpath("data/calibration.txt").read_text(encoding="utf-8")
    splitter = pre_tokenizers.Whitespace()
    counts: dict[str, int] = {}
    for word, _ in splitter.pre_tokenize_str(text):
        counts[word] = counts.get(word, 0) + 1
    words = sorted(counts, key=lambda word: (-counts[word], word))[: vocabulary - 2]
    known = {"<s>": 0, "<unk>": 1} | {word: i + 2 for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--blocks", type=int)
    options = parser.parse_args()
    config = config_of(options.shape, options.blocks)
    count = write_model(options.out, config)
    write_tokenizer(options.out, config.vocab_size)
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"{options.out}: {count:,} weights, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
