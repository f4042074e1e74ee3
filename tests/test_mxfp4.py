"""gpt-oss as it is published, its experts in MXFP4: read as transformers reads it, quantized like the same in bf16."""

import json
import shutil

import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import glq
from glq import GlqError, Settings, mxfp4, pipeline
from glq.source import SourceModel

SETTINGS = Settings(bits=4, codec="nested-4", tokens=128, ctx=32)
CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.embed_tokens"]}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small random gpt-oss in two files, one of them with no more than scales."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    torch.manual_seed(0)
    next(a for a in ARCHITECTURES if a.name == "gpt-oss").build().to(torch.bfloat16).save_pretrained(folder)
    tensors, scales = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, width // 32, 16), dtype=torch.uint8)
        scales[f"{name}_scales"] = torch.randint(120, 126, (experts, rows, width // 32), dtype=torch.uint8)
    (folder / "model.safetensors").unlink()
    named = {"model-1.safetensors": tensors, "model-2.safetensors": scales}
    for file, part in named.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {name: file for file, part in named.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    return folder


@pytest.fixture(scope="module")
def plain(published, tmp_path_factory):
    """What transformers makes of it, in bf16."""
    folder = tmp_path_factory.mktemp("plain")
    model = AutoModelForCausalLM.from_pretrained(published, dtype=torch.bfloat16)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    return folder


def test_weights_are_those_of_transformers(published, plain):
    source, expected = SourceModel(published), load_file(plain / "model.safetensors")
    assert source.files.keys() == expected.keys()
    assert all(torch.equal(source.read(name), tensor) for name, tensor in expected.items())


def test_quantized_it_is_the_model_in_16_bits_quantized(published, plain, tmp_path, monkeypatch):
    tokens = torch.randint(2, 302, (4, 32))
    monkeypatch.setattr(pipeline, "_calibration_windows", lambda *_: tokens)
    for name, model in (("a", published), ("b", plain)):
        glq.quantize(model, tmp_path / name, SETTINGS, device="cpu")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not [name for name in a if name.endswith(("_blocks", "_scales"))]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["quant_method"] == "glq"


def changed(published, folder, change):
    copy = shutil.copytree(published, folder / "copy")
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    (copy / "model.safetensors.index.json").unlink()
    both = {name: t for file in copy.glob("*.safetensors") for name, t in load_file(file).items()}
    save_file(both, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


NAME = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(f"{NAME}_scales", None), f"{NAME}_scales is missing"),
        (lambda t: t.pop(f"{NAME}_blocks", None), f"{NAME}_blocks is missing"),
    ],
)
def test_halves_are_refused(change, match, published, tmp_path):
    with pytest.raises(GlqError, match=match):
        SourceModel(changed(published, tmp_path, change))


def test_blocks_that_do_not_fit_and_exponents_of_nan():
    blocks, scales = torch.zeros(2, 8, 3, 16, dtype=torch.uint8), torch.full((2, 8, 3), 127, dtype=torch.uint8)
    for wrong in (blocks[:, :4], blocks[..., :8], blocks.short(), blocks[0]):
        with pytest.raises(GlqError, match="x is stored as MXFP4 blocks"):
            mxfp4.decode("x", wrong, scales)
    scales[1, 2, 0] = 255
    assert mxfp4.decode("x", blocks, scales).isnan().nonzero().tolist() == [[1, i, 2] for i in range(32)]


def test_other_quantized_models_are_still_refused(published, tmp_path):
    copy = shutil.copytree(published, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(GlqError, match="is quantized already .quant_method 'awq'"):
        SourceModel(copy)
