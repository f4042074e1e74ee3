"""What is refused, how it says so, and that nothing is lost: GlqError of a line or two, exit code 2, no traceback."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import glq.hf_integration  # noqa: F401
from glq import GlqError, quantize
from glq.checkpoint import inspect
from glq.config import GlqConfig


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_missing_model(refused, tmp_path):
    refused(tmp_path / "nowhere", "is not a directory: give a local model directory")


def test_directory_without_config(refused, model):
    (model / "config.json").unlink()
    refused(model, "has no config.json")


def test_broken_config(refused, model):
    (model / "config.json").write_text("{")
    refused(model, f"^{model / 'config.json'} cannot be read: [^/]*$")  # named once


def test_unknown_architecture(refused, model):
    edit_json(model / "config.json", lambda c: c.update(model_type="nonesuch"))
    refused(model, "nonesuch")


def test_model_that_is_no_language_model(refused, model):
    edit_json(model / "config.json", lambda c: c.update(model_type="vit", architectures=["ViTModel"]))
    refused(model, "cannot build a causal language model of type 'vit'")


def test_missing_weights(refused, model):
    (model / "model.safetensors").unlink()
    refused(model, "holds no safetensors weights")


def test_truncated_weights(refused, model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(model, "is damaged")


def test_missing_tensor(refused, model):
    edit_tensors(model / "model.safetensors", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    refused(model, "lacks 1 of the tensors of a 'llama' model, first model.layers.1.mlp.up_proj.weight")


def test_wrong_shape(refused, model):
    edit_json(model / "config.json", lambda c: c.update(intermediate_size=208))
    refused(model, r"expected shape \[208, 96\] from config.json, found \[200, 96\]")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(refused, model, value):
    edit_tensors(
        model / "model.safetensors",
        lambda t: t["model.layers.1.mlp.up_proj.weight"].index_fill_(0, torch.tensor(3), value),
    )
    refused(model, "model.layers.1.mlp.up_proj.weight .* holds NaN or infinite values")


def test_weights_that_make_activations_overflow(refused, model):
    edit_tensors(
        model / "model.safetensors",
        lambda t: [t[f"model.layers.0.mlp.{n}_proj.weight"].fill_(3e38) for n in ("gate", "up")],
    )
    refused(model, "layers.*reads NaN or infinite values on the calibration text|too large for 16-bit scales")


def test_already_quantized(refused, checkpoint):
    refused(checkpoint, "is quantized already")


def test_short_text(refused, model, tmp_path):
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    refused(model, "the text is too short: it has 3 tokens, a window takes 64", calibration=tmp_path / "short.txt")
    (tmp_path / "short.txt").write_text("w1 " * 100)
    refused(model, r"8 windows of 64 tokens .*fewer tokens \(64 at most\)", calibration=tmp_path / "short.txt")


def test_unreadable_text(refused, model, tmp_path):
    refused(model, "cannot read the text", calibration=tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    refused(model, "Give a UTF-8 text file", calibration=tmp_path / "binary")


def test_missing_tokenizer(refused, model):
    for file in model.glob("tokenizer*"):
        file.unlink()
    refused(model, "no usable tokenizer")


def test_unusable_device(refused, model):
    refused(model, "device 'warp' cannot be used: there is none of that name, name cuda or cpu", device="warp")


def test_output_that_holds_something(tiny_model, tiny_settings, text_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("ten years of work")
    with pytest.raises(GlqError, match="exists and is not an empty directory: nothing is overwritten"):
        quantize(tiny_model, tmp_path / "out", tiny_settings, calibration=text_file, device="cpu")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "ten years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_output_that_cannot_be_written(tiny_model, tiny_settings, text_file, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GlqError, match="cannot write to"):
        quantize(tiny_model, tmp_path / "file" / "out", tiny_settings, calibration=text_file, device="cpu")


def test_an_interrupted_run_leaves_nothing(tiny_model, tiny_settings, text_file, tmp_path):
    def stop(progress):
        if progress.done == 3:  # of the first block, before there is anything to go on from
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model, tmp_path / "out", tiny_settings, calibration=text_file, device="cpu", progress=stop)
    assert not list(tmp_path.iterdir())


# -- reading a checkpoint ---------------------------------------------------------------------------------------------


def unreadable(checkpoint, match):
    """Both `glq info` and transformers refuse it, with the same words."""
    with pytest.raises(GlqError, match=match):
        inspect(checkpoint)
    with pytest.raises(GlqError, match=match):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def quantization(change):
    return lambda content: change(content["quantization_config"])


NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda q: q.update(format_version=4), "has format version 4, .* reads 3: install a newer one"),
        (lambda q: q.update(format_version=1), "has format version 1, .* quantize the model again"),
        (lambda q: q.update(format_version="1"), "format_version must be an integer"),
        (lambda q: q.pop("format_version"), "format_version must be an integer of at least 1, found None"),
        (lambda q: q.update(groups=3), "unknown keys groups"),
        (lambda q: q.pop("modules"), "lacks modules"),
        (lambda q: q.update(modules={}), "at least one quantized layer"),
        (lambda q: q.update(bits="3"), "bits must be a number, found '3'"),
        (lambda q: q["modules"][NAME].update(codec="e9"), "unknown codec 'e9'"),
        (lambda q: q["modules"][NAME].update(codec=7), "codec must be a string, found 7"),
        (lambda q: q["modules"][NAME].update(block=7), "block 7 does not divide in_features 96"),
        (lambda q: q["modules"][NAME].update(block=96.0), "block must be a positive integer, found 96.0"),
        (lambda q: q["modules"][NAME].update(out_features=-1), "out_features must be a positive integer"),
        (lambda q: q["modules"][NAME].update(extra=1), "unknown keys extra"),
        (lambda q: q["modules"][NAME].pop("block"), "lacks block"),
        (lambda q: q["modules"].update({NAME: 3}), "expected an object"),
        (lambda q: q.update(tensor_parallel=0), "tensor_parallel must be a positive integer, found 0"),
        (lambda q: q["modules"][NAME].update(codec="nested-4"), "q_proj.codes should be U8 .*found U8"),
        (
            lambda q: q["modules"].update({"model.norm": q["modules"][NAME]}),
            "tensor model.norm.codes is missing|model.norm is no linear layer or embedding",
        ),
    ],
)
def test_changed_config(checkpoint, change, match):
    edit_json(checkpoint / "config.json", quantization(change))
    unreadable(checkpoint, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(f"{NAME}.codes"), f"{NAME}.codes is missing"),
        (lambda t: t.pop(f"{NAME}.scale"), f"{NAME}.scale is missing"),
        (lambda t: t.update({f"{NAME}.scale": t[f"{NAME}.scale"].float()}), f"{NAME}.scale should be F16"),
        (lambda t: t.update({f"{NAME}.codes": t[f"{NAME}.codes"][:, :1].clone()}), f"{NAME}.codes should be U8"),
        (lambda t: t.update({f"{NAME}.signs": t[f"{NAME}.signs"].repeat(2)}), f"{NAME}.signs should be U8"),
        (lambda t: t.update({f"{NAME}.weight": torch.zeros(96, 96)}), "packed tensors and a plain weight"),
    ],
)
def test_changed_tensors(checkpoint, change, match):
    edit_tensors(checkpoint / "model.safetensors", change)
    unreadable(checkpoint, match)


def test_lost_plain_tensor_is_never_made_up(checkpoint):
    edit_tensors(checkpoint / "model.safetensors", lambda t: t.pop("model.norm.weight"))
    with pytest.raises(GlqError, match=r"model\.norm\.weight"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_truncated_checkpoint(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    unreadable(checkpoint, "is damaged|checkpoint is incomplete")


def test_a_flipped_bit_is_found(checkpoint):
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(GlqError, match="is not the file that was written"):
        inspect(checkpoint)


def test_scales_that_are_not_finite(checkpoint):
    edit_tensors(checkpoint / "model.safetensors", lambda t: t[f"{NAME}.scale"].fill_(torch.nan))
    with pytest.raises(GlqError, match=f"{NAME}.scale holds NaN"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_index_that_leaves_the_directory(checkpoint):
    index = {"metadata": {}, "weight_map": {"a": "../../etc/passwd.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(GlqError, match="do not trust it"):
        inspect(checkpoint)


def test_index_that_names_what_is_not_there(checkpoint):
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    with pytest.raises(GlqError, match="names 1 tensors that its files do not hold, first a"):
        inspect(checkpoint)
    index.write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    with pytest.raises(GlqError, match=r"model-2.safetensors is missing"):
        inspect(checkpoint)
    index.write_text("[]")
    with pytest.raises(GlqError, match="is not a safetensors index"):
        inspect(checkpoint)


def test_a_config_changed_within_its_shapes_is_found(checkpoint):
    """Two codecs of 28 bits: without the digest, the one would be taken for the other."""
    import glq.checkpoint

    edit_json(checkpoint / "config.json", quantization(lambda q: q["modules"][NAME].update(block=48)))
    unreadable(checkpoint, "has another quantization_config than was written")
    edit_json(checkpoint / glq.checkpoint.DIGESTS, lambda d: d.pop("config"))
    inspect(checkpoint)


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("config.json", "[" * 100_000, "cannot be read"),
        ("glq_sha256.json", "[]", "holds no digests"),
        ("glq_sha256.json", '{"sha256": {}}', "is not the file that was written"),
        ("model.safetensors.index.json", '{"weight_map": ' * 50_000, "cannot be read"),
        ("model.safetensors.index.json", json.dumps({"weight_map": {"a": "9" * 300 + ".safetensors"}}), "is missing"),
    ],
)
def test_json_that_nobody_vouches_for(checkpoint, name, text, match):
    (checkpoint / name).write_text(text)
    with pytest.raises(GlqError, match=match):
        inspect(checkpoint)


def test_code_that_comes_with_a_model_is_not_run(refused, model):
    (model / "own.py").write_text("raise SystemExit('was run')")
    edit_json(
        model / "config.json",
        lambda c: c.update(model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}),
    )
    refused(model, "is not a config that transformers reads: .*custom code")


def test_mutated_checkpoints(tmp_path):
    """As bench/fuzz.py does at length."""
    fuzz = Path(__file__).parent.parent / "bench" / "fuzz.py"
    line = [sys.executable, str(fuzz), "--count", "300", "--folder", str(tmp_path)]
    done = subprocess.run(
        line, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(fuzz.parent.parent)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "300 mutants" in done.stdout


def test_giant_header(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(GlqError, match="is damaged"):
        inspect(checkpoint)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=4,
)
KEYS = ["quant_method", "format_version", "glq_version", "bits", "modules", "other"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(KEYS), JSON), st.booleans())
def test_no_config_gets_through_or_crashes(raw, plausible):
    if plausible:
        raw |= {"quant_method": "glq", "format_version": 3}
    with pytest.raises(GlqError):
        GlqConfig.from_dict(raw)


@pytest.mark.parametrize("codec", ["trellis-2", "trellis-2.25", "trellis-3", "trellis-3.25", "e8-2"])
def test_the_older_format_is_read_where_it_means_the_same(codec, tiny_checkpoint):
    raw = json.loads((tiny_checkpoint / "config.json").read_text())["quantization_config"]
    raw["format_version"] = 2
    for module in raw["modules"].values():
        module["codec"] = codec
    if codec in ("trellis-2.25", "trellis-3"):
        with pytest.raises(GlqError, match=f"format version 2, .* in which {codec} meant other values"):
            GlqConfig.from_dict(raw)
    else:
        assert GlqConfig.from_dict(raw).modules[NAME].codec == codec


def test_config_round_trip(tiny_checkpoint):
    raw = json.loads((tiny_checkpoint / "config.json").read_text())["quantization_config"]
    assert GlqConfig.from_dict(raw).to_dict() == raw
