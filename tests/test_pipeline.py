"""Quantizing end to end, on a tiny random model: what is written is what was computed, and transformers loads it."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import make_model, make_moe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import glq
import glq.hf_integration
from glq import GlqError, Settings, passes, quantize
from glq.calibration import calibrate_block
from glq.checkpoint import inspect, read_config
from glq.discovery import capture, find_groups
from glq.linear import QuantLinear
from glq.shards import read_ahead
from glq.source import SourceModel


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kwargs).eval()


def test_checkpoint_loads_packed_and_stays_close_to_the_reference(tiny_model, tiny_checkpoint):
    model, reference = load(tiny_checkpoint), load(tiny_model)
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 14
    assert not [name for name, t in model.state_dict().items() if t.is_meta]
    ids = torch.arange(60)[None]
    y, z = model(ids).logits, reference(ids).logits
    assert (y - z).norm() / z.norm() < 0.25
    assert torch.equal(model.model.embed_tokens.weight, reference.model.embed_tokens.weight)


def test_reloaded_logits_equal_the_fake_quantized_model(tiny_model, tiny_checkpoint):
    """The reference with every weight replaced by its dequantized one, against the packed checkpoint."""
    model, fake = load(tiny_checkpoint), load(tiny_model)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            fake.get_submodule(name).weight.data = module.packed.dequantize()
    ids = torch.arange(100)[None]
    y, z = model(ids).logits, fake(ids).logits
    assert (y - z).abs().max() / z.abs().max() < 1e-5


def test_in_memory_layers_are_the_ones_written(tiny_model, tiny_settings, text_file, tmp_path, monkeypatch):
    """The weights with which calibration went on are those that the checkpoint decodes to, to the bit."""
    import glq.rounder as rounder

    used = []
    original = rounder.round_layers

    def spy(layers, *args):
        packed, lost = original(layers, *args)
        used.extend(p.dequantize() for p in packed)
        return packed, lost

    monkeypatch.setattr(rounder, "round_layers", spy)
    quantize(tiny_model, tmp_path / "out", tiny_settings, calibration=text_file, device="cpu")
    model = load(tmp_path / "out")
    read = [module.packed.dequantize() for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(read) == len(used) == 14
    for weight, again in zip(used, read, strict=True):
        assert torch.equal(weight, again)


def test_same_settings_same_bytes_and_other_seed_other_bytes(
    tiny_model, tiny_checkpoint, tiny_settings, text_file, tmp_path
):
    quantize(tiny_model, tmp_path / "again", tiny_settings, calibration=text_file, device="cpu")
    other = Settings(bits=3, tokens=512, ctx=64, seed=1)
    quantize(tiny_model, tmp_path / "other", other, calibration=text_file, device="cpu")
    weights = [
        (d / "model.safetensors").read_bytes() for d in (tiny_checkpoint, tmp_path / "again", tmp_path / "other")
    ]
    assert weights[0] == weights[1] != weights[2]
    for name in ("config.json", "quantization.json"):
        assert (tiny_checkpoint / name).read_text() == (tmp_path / "again" / name).read_text()


@pytest.mark.parametrize("bits", [1.5, 2, 2.5, 3.5, 4])
def test_every_rate_runs_and_more_bits_lose_less(bits, tiny_model, tiny_checkpoint, text_file, tmp_path):
    settings = Settings(bits=bits, tokens=512, ctx=64)
    result = quantize(tiny_model, tmp_path / "out", settings, calibration=text_file, device="cpu")
    at_three = json.loads((tiny_checkpoint / "quantization.json").read_text())["errors"]
    assert (sum(result.errors.values()) > sum(at_three.values())) == (bits < 3)
    assert inspect(tmp_path / "out").bits == pytest.approx(result.bits)


def test_any_rate_for_any_layer(tiny_model, text_file, tmp_path):
    exceptions = (("*.v_proj", "nested-4"), ("*.1.mlp.*", "e8-1.5"), ("*.down_proj", "e8-3.5"))
    settings = Settings(bits=2, layers=exceptions, tokens=512, ctx=64)
    quantize(tiny_model, tmp_path / "out", settings, calibration=text_file, device="cpu")
    modules = inspect(tmp_path / "out").config.modules
    found = {name.removeprefix("model.layers."): module.codec for name, module in modules.items()}
    assert found["0.self_attn.q_proj"] == found["0.mlp.up_proj"] == "trellis-2"
    assert found["1.self_attn.v_proj"] == "nested-4"
    assert found["1.mlp.up_proj"] == "e8-1.5"
    assert found["1.mlp.down_proj"] == "e8-3.5"
    model = load(tmp_path / "out")
    attention = model.model.layers[0].self_attn
    assert torch.equal(attention.q_proj.signs, attention.v_proj.signs)  # they read the same input
    ids = torch.arange(60)[None]
    y, z = model(ids).logits, load(tiny_model)(ids).logits
    assert (y - z).norm() / z.norm() < 0.5


def test_stored_bits_are_counted_from_the_files(tiny_checkpoint):
    from safetensors import safe_open

    summary = inspect(tiny_checkpoint)
    with safe_open(tiny_checkpoint / "model.safetensors", "pt") as f:
        packed = [f.get_tensor(k) for k in f.keys() if k.endswith((".codes", ".scale", ".signs"))]  # noqa: SIM118
        other = [f.get_tensor(k) for k in f.keys() if k.endswith(".weight")]  # noqa: SIM118
    assert summary.quantized_bytes == sum(t.numel() * t.element_size() for t in packed)
    assert summary.other_bytes == sum(t.numel() * t.element_size() for t in other)
    header = summary.file_bytes - summary.quantized_bytes - summary.other_bytes
    assert 0 < header < 10_000
    assert json.loads((tiny_checkpoint / "config.json").read_text())["quantization_config"]["bits"] == round(
        summary.bits, 4
    )


def test_generate_save_and_dequantize(tiny_checkpoint, tmp_path):
    model = load(tiny_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    inputs = tokenizer("w1 w2 w3", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(again.generate(**inputs, max_new_tokens=8, do_sample=False), tokens)
    dense = model.dequantize(torch.float32)
    assert not [m for m in dense.modules() if isinstance(m, QuantLinear)]
    assert torch.equal(dense.generate(**inputs, max_new_tokens=8, do_sample=False), tokens)
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_half_precision_and_device_map(tiny_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, device_map="cpu", torch_dtype=torch.bfloat16)
    reference = load(tiny_checkpoint)
    ids = torch.arange(50)[None]
    assert model(ids).logits.dtype == torch.bfloat16
    y, z = model(ids).logits.float(), reference(ids).logits
    assert (y - z).norm() / z.norm() < 0.03


def test_load_dequantizes_on_a_cpu(tiny_checkpoint):
    ids = torch.arange(50)[None]
    model = glq.load(tiny_checkpoint, device="cpu")
    assert not [m for m in model.modules() if isinstance(m, QuantLinear)]
    torch.testing.assert_close(model(ids).logits, load(tiny_checkpoint)(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [{"tie_word_embeddings": True}, {"attention_bias": True}, {"num_hidden_layers": 1}])
def test_variants_of_a_model(change, text_file, tmp_path):
    make_model(tmp_path / "model", **change)
    settings = Settings(4, "nested-4", tokens=512, ctx=64)
    quantize(tmp_path / "model", tmp_path / "out", settings, calibration=text_file, device="cpu")
    ids = torch.arange(60)[None]
    y, z = load(tmp_path / "out")(ids).logits, load(tmp_path / "model")(ids).logits
    assert (y - z).norm() / z.norm() < 0.15


def test_sharded_source_and_sharded_output(
    tiny_model, tiny_checkpoint, tiny_settings, text_file, tmp_path, monkeypatch
):
    import glq.writer as writer

    load(tiny_model).to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    monkeypatch.setattr(writer, "SHARD_BYTES", 30_000)
    quantize(tmp_path / "model", tmp_path / "out", tiny_settings, calibration=text_file, device="cpu")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    ids = torch.arange(60)[None]
    assert torch.equal(load(tmp_path / "out")(ids).logits, load(tiny_checkpoint)(ids).logits)


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_what_is_read_ahead_is_what_loading_reads(kind, tiny_model, tmp_path, monkeypatch):
    """Experts lie one by one in the files. A file that is gone is no error yet."""
    model = shutil.copytree(tiny_model, tmp_path / "m") if kind == "dense" else make_moe(tmp_path / "m", "qwen3-moe")
    source, original, failed = SourceModel(model), SourceModel._read_all, []
    ahead, loaded, read = [], [], []
    monkeypatch.setattr(SourceModel, "_read_all", lambda *args: loaded.extend(args[1]) or original(*args))
    monkeypatch.setattr("glq.source.read_ahead", lambda file, names: ahead.extend(names) or read_ahead(file, names))
    monkeypatch.setattr("glq.shards._Entry.pieces", lambda entry: read.append(entry.name) or iter(()))
    monkeypatch.setattr("threading.excepthook", failed.append)
    source.expect(source.blocks[1]).join()
    source.load(source.blocks[1], torch.device("cpu"), torch.float32)
    assert sorted(read) == sorted(ahead) == sorted(set(loaded))
    (model / "model.safetensors").unlink()
    source.expect(source.blocks[0]).join()
    assert not failed


def test_layers_that_read_the_same_input_are_one_group(tiny_model):
    source = SourceModel(tiny_model)
    device = torch.device("cpu")
    hidden, calls = capture(source, [torch.arange(32)[None]], device, torch.float32)
    block = source.load(source.blocks[0], device, torch.float32)
    groups, _ = find_groups(block, hidden[0], calls[0][0])
    assert groups == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


def test_calibration_runs_both_models_block_by_block(tiny_model):
    """Moments against a plain forward pass with hooks; the drift is that of the weights replaced on the way."""
    source = SourceModel(tiny_model)
    device = torch.device("cpu")
    batches = [torch.arange(32)[None], torch.arange(32, 64)[None]]
    inputs, calls = capture(source, batches, device, torch.float32)
    name = source.blocks[0]
    block = source.load(name, device, torch.float32)
    first = [c[0] for c in calls]
    groups, _ = find_groups(block, inputs[0], first[0])
    reference, quantized = list(inputs), list(inputs)
    found = []

    def half_the_weights(twin, read):
        for group in read:
            found.append(group.inputs)
            for member in group.members:
                twin.get_submodule(member).weight.data *= 0.5

    steps = list(calibrate_block(block, groups, reference, quantized, first, first, device, half_the_weights))
    assert steps == [0, 1, 2, 3, 4]
    down = []
    hook = block.get_submodule("mlp.down_proj").register_forward_pre_hook(lambda _, args: down.append(args[0][0]))
    with torch.no_grad():
        plain = [block(x, *call.args, **call.kwargs) for x, call in zip(inputs, first, strict=True)]
        for parameter in block.parameters():
            if parameter.dim() == 2:
                parameter.data *= 0.5
        halved = [block(x, *call.args, **call.kwargs) for x, call in zip(inputs, first, strict=True)]
    hook.remove()
    for expected, got in ((plain, reference), (halved, quantized)):
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b, a[0] if isinstance(a, tuple) else a)
    assert found[0].drift.abs().max() == 0
    x, x_hat = torch.cat(down[:2]), torch.cat(down[2:])
    torch.testing.assert_close(found[3].hessian, x_hat.T @ x_hat / 64)
    torch.testing.assert_close(found[3].drift, (x - x_hat).T @ x_hat / 64)


@pytest.mark.parametrize("side_by_side", [False, True])
def test_passes_that_begin_anew_give_the_same_bytes_as_those_that_wait(
    tiny_model, text_file, tmp_path, monkeypatch, side_by_side
):
    settings = Settings(3, "nested-3", tokens=512, ctx=64, side_by_side=side_by_side)
    quantize(tiny_model, tmp_path / "paused", settings, calibration=text_file, device="cpu")
    monkeypatch.setattr("glq.calibration.begin", passes._Repeated)
    quantize(tiny_model, tmp_path / "repeated", settings, calibration=text_file, device="cpu")
    paused, repeated = (load_file(tmp_path / name / "model.safetensors") for name in ("paused", "repeated"))
    assert paused.keys() == repeated.keys()
    for name in paused:
        assert torch.equal(paused[name], repeated[name]), name


def test_rotations_stay_inside_tensor_parallel_shards(text_file, tmp_path):
    model = make_model(tmp_path / "model", hidden_size=128, intermediate_size=256)
    settings = Settings(3, "nested-3", tokens=512, ctx=64, tensor_parallel=2)
    quantize(model, tmp_path / "out", settings, calibration=text_file, device="cpu")
    config = read_config(tmp_path / "out")
    assert config.tensor_parallel == 2
    for name, module in config.modules.items():
        assert module.block == {"o_proj": 64, "down_proj": 128}.get(name.rpartition(".")[2], 128)
    assert "tensor_parallel" not in replace(config, tensor_parallel=1).to_dict()
    load(tmp_path / "out")


def test_a_dead_channel_is_handled(tiny_model, text_file, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][7] = 0
    tensors["model.layers.1.mlp.up_proj.weight"][:] = 0  # and a layer whose output, the next one's input, is all zeros
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    settings = Settings(2, "e8-2", tokens=512, ctx=64)
    quantize(tmp_path / "model", tmp_path / "out", settings, calibration=text_file, device="cpu")
    assert torch.isfinite(load(tmp_path / "out")(torch.arange(60)[None]).logits).all()


def test_what_is_slow_on_a_cpu_says_so_at_loading(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.warns(UserWarning, match=r"no kernels for CPUs.* `model = model\.dequantize\(\)`, or glq\.load"):
        AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        glq.load(tiny_checkpoint, device="cpu")
    assert not [w for w in caught if "kernels" in str(w.message)]


def test_settings_are_checked():
    with pytest.raises(GlqError, match="bits must lie between 1.5 and 4, found 5"):
        Settings(bits=5)
    with pytest.raises(GlqError, match="codec 'e8-2' stores 2 bits, not 3: ask for 2 .--bits 2."):
        Settings(bits=3, codec="e8-2")
    with pytest.raises(GlqError, match="100 tokens are less than a window of 1024"):
        Settings(tokens=100, ctx=1024)
    with pytest.raises(GlqError, match="at least 16 tokens, found --ctx 0"):
        Settings(ctx=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_quantizes_as_well_as_the_cpu(tiny_model, tiny_checkpoint, tiny_settings, text_file, tmp_path):
    result = quantize(tiny_model, tmp_path / "out", tiny_settings, calibration=text_file, device="cuda")
    on_cpu = json.loads((tiny_checkpoint / "quantization.json").read_text())["errors"]
    assert sum(result.errors.values()) == pytest.approx(sum(on_cpu.values()), rel=0.03)
