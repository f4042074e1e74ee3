"""Many architectures: what is loaded is the model that was in memory when it was quantized."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import glq
from glq import Settings, calibration, pipeline
from glq.hf_integration import load

ROOT = Path(__file__).parent.parent
KINDS = (  # one of each kind is always tested, the others with --slow
    "Llama",
    "Qwen3-MoE",
    "Gemma 3 (images)",
    "Gemma 3n",
    "Gemma 4 (E4B's kind)",
    "Phi-3, Phi-4",
    "gpt-oss",
    "DeepSeek-V3",
    "Bamba",
    "Qwen3-Next",
)
OTHERS = [a for a in ARCHITECTURES if a.name not in KINDS]
SETTINGS = Settings(bits=4, codec="nested-4", tokens=128, ctx=32)


def written(architecture, path: Path) -> Path:
    """Its model in 16 bits. Biases and norms are random: those of a new model would hide that they are not read."""
    torch.manual_seed(0)
    architecture.build().to(torch.bfloat16).save_pretrained(path)
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("bias") or (tensor.ndim == 1 and "norm" in name):
                tensors[name] = tensor + torch.randn_like(tensor) / 20
        save_file(tensors, file, metadata={"format": "pt"})
    return path


def last_block(model, source_block: str):
    return next(module for name, module in model.named_modules() if name == source_block)


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, marks=[pytest.mark.slow] if a in OTHERS else []) for a in ARCHITECTURES],
    ids=lambda a: a.name,
)
def test_loaded_is_what_was_in_memory(architecture, tmp_path, monkeypatch):
    memory = {}
    walk = calibration.walk

    def remember(source, reference, quantized, *args, **kwargs):
        yield from walk(source, reference, quantized, *args, **kwargs)
        memory.update(block=source.blocks[-1], quantized=quantized, reference=reference)

    tokens = torch.randint(2, 302, (4, 32))
    monkeypatch.setattr(pipeline, "walk", remember)
    monkeypatch.setattr(pipeline, "_calibration_windows", lambda *_: tokens)
    model = written(architecture, tmp_path / "model")
    result = glq.quantize(model, tmp_path / "out", SETTINGS, device="cpu")
    original, loaded = load(model, device="cpu"), load(tmp_path / "out", device="cpu")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        y, z = packed(tokens, use_cache=False).logits, loaded(tokens, use_cache=False).logits
    assert (y - z).norm() <= 1e-4 * z.norm()
    ends = []
    for each in (original, loaded):
        hook = last_block(each, memory["block"]).register_forward_hook(
            lambda _, __, y: ends.append(y[0] if isinstance(y, tuple) else y)
        )
        with torch.no_grad():
            each.base_model(input_ids=tokens, use_cache=False)
        hook.remove()
    of_original, of_loaded = ends
    reference, quantized = (torch.cat(memory[key], dim=of_loaded.ndim - 3) for key in ("reference", "quantized"))
    assert (of_original - reference).norm() <= 3e-4 * reference.norm()  # Gemma 4 has a factor in 16 bits
    assert (of_loaded - quantized).norm() <= 3e-4 * quantized.norm()
    assert 1e-3 < (of_loaded - of_original).norm() / of_original.norm() < 0.6  # 4 bits, of random weights
    record = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert record.get("left", {}) == result.left
    plain = {n for n, m in original.named_modules() if isinstance(m, torch.nn.Linear)}
    assert result.left.keys() <= plain | {n for n, p in original.named_parameters() if p.ndim > 1}
    assert not any(reason.startswith("is outside") for n, reason in result.left.items() if n.startswith("model.layers"))


def test_the_list_of_models_is_current():
    spec = importlib.util.spec_from_file_location("list_models", ROOT / "tools" / "list_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == module.page(), "run tools/list_models.py"
