"""Writes docs/models.md from the list of architectures that tests/test_architectures.py quantizes."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAD = """# Models

Any causal language model that transformers builds from its config, whose weights are in safetensors. There is no list of architectures in
glq: which layers there are, which of them read the same input and how a model calls its blocks is found by running one block of each kind
before any work (`glq/discovery.py`), and what glq cannot quantize is refused then.

Linear layers of decoder blocks and experts are quantized. What stays in 16 bits is named in `quantization.json` (`left`, with the reason), and `glq
quantize` says how many they are: whatever is outside of decoder blocks (vision towers, projectors, embeddings of each layer; embeddings and lm_head
unless `--embeddings` and `--head` are given), routers, layers that run more than once in a pass or whose weight is used in another way, and layers so small
that their tiles would be mostly padding. Matrices of blocks that are no linear layers stay, too. Refused are experts that are neither transformers' 3-D
parameters nor layers that read all tokens.

Experts are those that transformers holds as 3-D parameters, however the files store them, each rounded for the tokens that came to it; `glq
quantize` says which came too short, and more `--tokens` help. Experts in other forms (Llama 4, LongCat-Flash) are refused.

Each of these is quantized in the tests, small and random, saved, loaded, and compared with the model that was in memory. Those marked with ✓ are served by
real vLLM 0.32.0 on a CPU, too, and give transformers' tokens and log-probs there (tests/test_vllm_architectures.py; of models that see, the text alone):

| model | class in transformers | | vLLM |
|---|---|---|---|
"""


def page() -> str:
    """docs/models.md"""
    if str(ROOT / "tests") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests"))
    from architectures import ARCHITECTURES

    return HEAD + "".join(f"| {a.name} | `{a.model}` | {a.special} | {a.vllm or '✓'} |\n" for a in ARCHITECTURES)


if __name__ == "__main__":
    (ROOT / "docs" / "models.md").write_text(page(), encoding="utf-8")
