"""Fixtures: a tiny random model with a tokenizer of its own, and the real SmolLM2-135M for slow tests."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")
    parser.addoption("--upstream-fixtures", help="directory of checkpoints that upstream glq wrote")


LONGEST = "test_smollm2.py"  # first, so that no process is left with it at the end


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name != LONGEST)
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="needs --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """About 60,000 characters of varied words."""
    generator = torch.Generator().manual_seed(1)
    words = [f"w{i}" for i in range(300)]
    picks = torch.randint(0, len(words), (12_000,), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(words[i] for i in picks), encoding="utf-8")
    return path


def make_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(300)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(path)


def make_model(path: Path, **changes) -> Path:
    """A random Llama of odd sizes: 96 wide (3⊗32), an MLP of 200 (25⊗8, not a whole number of tiles)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 302,
        "hidden_size": 96,
        "intermediate_size": 200,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings | changes))
    model.to(torch.bfloat16).save_pretrained(path)
    make_tokenizer(path)
    return path


MOE = {
    "vocab_size": 302,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": None,
    "initializer_range": 0.1,  # larger than by default: tokens differ, and so do the experts they go to
}


def make_moe(path: Path, kind: str, **changes) -> Path:
    """A random Qwen3-MoE of 6 experts with an MLP of 72 (a tile and a bit), or Mixtral of 4 with one of 128."""
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    if kind == "qwen3-moe":
        own = {"num_experts": 6, "moe_intermediate_size": 72, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE | own | changes))
    else:
        own = {"num_local_experts": 4, "intermediate_size": 128, "sliding_window": None}
        model = MixtralForCausalLM(MixtralConfig(**MOE | own | changes))
    model.to(torch.bfloat16).save_pretrained(path)
    make_tokenizer(path)
    return path


def add_biases(model: Path) -> None:
    """Those of a new model are zeros, which would hide that they are not read."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    for name in tensors:
        if name.endswith(".bias"):
            tensors[name] = torch.randn_like(tensors[name]) / 50
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_settings():
    from glq import Settings

    return Settings(bits=3, tokens=512, ctx=64)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model, tiny_settings, text_file, tmp_path_factory) -> Path:
    from glq import quantize

    out = tmp_path_factory.mktemp("quantized") / "out"
    quantize(tiny_model, out, tiny_settings, calibration=text_file, device="cpu")
    return out


@pytest.fixture(scope="session")
def tiny_even(text_file, tmp_path_factory) -> Path:
    """A checkpoint with biases and a quantized, tied head that can be cut for two tensor-parallel ranks."""
    from glq import Settings, quantize

    folder = tmp_path_factory.mktemp("even")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 384}
    model = make_model(folder / "model", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, **sizes)
    add_biases(model)
    layers = (("*.k_proj", "trellis-4"), ("*.gate_proj", "nested-4"))
    settings = Settings(3, tokens=512, ctx=64, layers=layers, head=4, tensor_parallel=2)
    quantize(model, folder / "out", settings, calibration=text_file, device="cpu")
    return folder / "out"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real model, kept in demo/ as `make demo` keeps it."""
    root = Path(__file__).parent.parent
    out = root / "demo" / "smollm2-135m"
    if not (out / "config.json").is_file():
        spec = importlib.util.spec_from_file_location("fetch_model", root / "tools" / "fetch_model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main(out)
    return out


@pytest.fixture
def refused(tiny_settings, text_file, tmp_path):
    """Quantizing must fail with a short GlqError and leave nothing behind."""
    from glq import GlqError, quantize

    def check(model, match, settings=tiny_settings, calibration=text_file, device="cpu"):
        with pytest.raises(GlqError, match=match) as info:
            quantize(model, tmp_path / "out", settings, calibration=calibration, device=device)
        assert str(info.value).count("\n") <= 1
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))

    return check
