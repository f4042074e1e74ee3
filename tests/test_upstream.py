"""Checkpoints of upstream glq: tables, weights, what is refused, and that models with them are what they mean."""

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner
from upstream_writer import (
    Writer,
    llama,
    rotation,
    save_table,
    signs,
    table,
    with_weights,
    write,
    write_model,
    write_moe,
)

import glq.hf_integration
from glq.cli import app
from glq.upstream import codebooks, trellis
from glq.upstream.convert import inspect_upstream
from glq.upstream.linear import UpstreamEmbedding, UpstreamLinear
from glq.upstream.reader import read_upstream

CPU = torch.device("cpu")
CODECS = ["e8_shell", "e8_relaxed", "e8p", "3inst", "hyb"]
TABLES = {  # of fp32 values, from the format's description
    "shell_table": "c46821e43e5a573cc3431a06377121bc3b7d694e6ae0d20cb8e765c97b47cff7",
    "relaxed_table": "53d0a777f79c57e59a39585f4df7f5e842e49e575a1c1c2cc11f7feac8c1113a",
    "e8p_table": "69038254fded6881558c6369a333e7e5a9160a1425321c215a1cef0278cbea7a",
    "e81b_table": "316d863757a0fe95c5e7c0c8bb1449460a952e1ae7ae7d6c0d9bf9809856a75f",
    "computed_table": "0540d77c8b460a6a2c9c8441594e2810736c34745a6783488787ce1c03b927ec",
}


def load(path: Path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options)


def held(model) -> dict:
    kinds = UpstreamLinear, UpstreamEmbedding
    return {name: module.weight_of() for name, module in model.named_modules() if isinstance(module, kinds)}


def worst(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - w).abs().max() / w.abs().max()) for n, w in expected.items())


def difference(a, b, ids=None) -> float:
    ids = torch.arange(2, 14).view(2, 6) if ids is None else ids
    with torch.no_grad():
        y, expected = a(ids).logits, b(ids).logits
    return float((y - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", TABLES)
def test_tables_have_the_digests_of_the_description(name):
    made = getattr(trellis if name == "computed_table" else codebooks, name)().on(CPU)
    assert hashlib.sha256(made.float().numpy().tobytes()).hexdigest() == TABLES[name]


@pytest.mark.parametrize(
    ("codec", "bits"),
    [(c, b) for c in CODECS for b in (2, 3, 4, 5, 8) if not (c == "hyb" and b in (3, 5))]
    + [("e8p", 7), ("e8_shell", 6)],
)
def test_weights_are_those_that_the_codes_mean(codec, bits, tmp_path):
    model = llama()
    path, expected = write_model(tmp_path / "m", model, Writer(codec, bits))
    loaded = load(path)
    assert worst(held(loaded), expected) <= 1e-6
    assert difference(loaded, with_weights(model, expected)) <= 1e-5
    assert loaded.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 5)


@pytest.mark.parametrize("bits", [2, 4])
def test_old_versions_pad_to_powers_of_two_and_write_empty_stages(bits, tmp_path):
    model = llama()
    path, expected = write_model(tmp_path / "m", model, Writer("e8_shell", bits, legacy=True))
    loaded = load(path)
    assert worst(held(loaded), expected) <= 1e-6
    assert difference(loaded, with_weights(model, expected)) <= 1e-5
    if bits == 2:
        assert not any("Qidxs2" in name for name in loaded.state_dict())


def test_sizes_that_are_no_multiples_of_eight_or_powers_of_two(tmp_path):
    model = llama(intermediate_size=92, hidden_size=68, head_dim=34)
    path, expected = write_model(tmp_path / "m", model, Writer("e8_shell", 3))
    assert worst(held(load(path)), expected) <= 1e-6


def test_a_cast_leaves_scales_and_codes_as_they_are(tmp_path):
    path, expected = write_model(tmp_path / "m", llama(), Writer("e8p", 5))
    loaded = load(path, dtype=torch.bfloat16)
    torch.nn.Module.half(loaded)
    assert worst(held(loaded), expected) <= 1e-6
    assert loaded(torch.tensor([[3, 4]])).logits.dtype == torch.float16


def test_dequantized_model_is_the_same(tmp_path):
    path, _ = write_model(tmp_path / "m", llama(), Writer("3inst", 6))
    packed, plain = load(path), load(path).dequantize(torch.float32)
    assert not held(plain)
    assert difference(packed, plain) <= 1e-5
    assert difference(glq.load(path, device="cpu"), plain) <= 1e-6


def test_biases_that_upstream_dropped_count_as_zeros(tmp_path):
    model = llama(attention_bias=True)
    path, expected = write_model(tmp_path / "m", model, Writer("e8_shell", 2))
    with pytest.warns(UserWarning, match="those of 4 layers"):
        loaded = load(path)
    assert difference(loaded, with_weights(model, expected)) <= 1e-5


def test_biases_that_are_there_are_added(tmp_path):
    model = llama(attention_bias=True)
    path, expected = write_model(tmp_path / "m", model, Writer("e8_shell", 2))
    biases = {f"{n}.bias": torch.randn(len(w)).half() for n, w in expected.items() if "self_attn" in n}
    save_file(load_file(path / "model.safetensors") | biases, path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = load(path)
    plain = with_weights(model, expected)
    for name, bias in biases.items():
        plain.get_parameter(name).data = bias.float()
    assert difference(loaded, plain) <= 1e-5


@pytest.mark.parametrize(("old", "new"), [("model.", "model.language_model."), ("model.", "language_model.model.")])
def test_names_with_another_beginning(old, new, tmp_path):
    path, expected = write_model(tmp_path / "m", llama(), Writer("e8_shell", 4))
    file = path / "model.safetensors"
    save_file({n.replace(old, new, 1): t for n, t in load_file(file).items()}, file)
    assert worst(held(load(path)), expected) <= 1e-6


def test_shards(tmp_path):
    path, expected = write_model(tmp_path / "m", llama(), Writer("e8p", 4))
    tensors = sorted(load_file(path / "model.safetensors").items())
    (path / "model.safetensors").unlink()
    parts = [dict(tensors[: len(tensors) // 2]), dict(tensors[len(tensors) // 2 :])]
    index = {}
    for i, part in enumerate(parts):
        save_file(part, path / f"model-{i}.safetensors")
        index |= dict.fromkeys(part, f"model-{i}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert worst(held(load(path)), expected) <= 1e-6


# The checkpoint's own table


def test_the_checkpoints_own_table_is_taken(tmp_path):
    values = torch.randint(-6, 7, (300, 8)).float() / 2
    path, expected = write_model(tmp_path / "m", llama(), Writer("e8_shell", 4, values=values.double().numpy()))
    save_table(path, values)
    assert worst(held(load(path)), expected) <= 1e-6


@pytest.mark.parametrize("codec", ["e8_relaxed", "e8p"])
def test_a_table_beside_other_codecs_is_not_read(codec, tmp_path):
    path, expected = write_model(tmp_path / "m", llama(), Writer(codec, 4))
    (path / "e8_codebook.pt").write_bytes(b"no zip at all")
    assert worst(held(load(path)), expected) <= 1e-6


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_no_pickle_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, expected = write_model(tmp_path / "m", llama(), Writer("e8_shell", 2))
    save_table(path, codebooks.shell_table().on(CPU).float(), more=Bomb())
    assert worst(held(load(path)), expected) <= 1e-6
    assert not Path("executed").exists()


# Experts, and embeddings of each layer


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("codec", ["e8_shell", "e8p", "3inst"])
def test_experts(codec, joint, tmp_path):
    path, plain = write_moe(tmp_path / "m", Writer(codec, 4), joint)
    loaded = load(path)
    assert difference(loaded, plain) <= 1e-5
    assert difference(loaded.dequantize(torch.float32), plain) <= 1e-5
    out = tmp_path / "dense"
    glq.upstream.convert.convert(path, out, dense=True)
    assert difference(load(out), plain) <= 1e-5


def test_a_router_that_was_quantized_is_decoded(tmp_path, caplog):
    writer = Writer("e8p", 4)
    path, plain = write_moe(tmp_path / "m", writer, joint=False)
    tensors, name = load_file(path / "model.safetensors"), "model.layers.0.mlp.gate"
    made, weight = writer.matrix(3, 64)
    del tensors[f"{name}.weight"]
    tensors |= {f"{name}.{key}": tensor for key, tensor in made.items()}
    save_file({key: t.contiguous().clone() for key, t in tensors.items()}, path / "model.safetensors")
    plain.get_parameter(f"{name}.weight").data = weight.float()
    assert difference(load(path), plain) <= 1e-5
    assert "MISSING" not in caplog.text
    assert "UNEXPECTED" not in caplog.text


def test_experts_by_mixtrals_names(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 32, "vocab_size": 120, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes | heads, dtype="float32")).float()
    writer = Writer("e8_shell", 3)
    path, expected = write_model(tmp_path / "m", model, writer)
    tensors, experts = load_file(path / "model.safetensors"), model.model.layers[0].mlp.experts
    tensors = {key.replace(".mlp.", ".block_sparse_moe."): t for key, t in tensors.items() if ".experts." not in key}
    for e in range(3):
        (gate, a), (up, b), (down, c) = (writer.matrix(*shape) for shape in ((32, 64), (32, 64), (64, 32)))
        experts.gate_up_proj.data[e], experts.down_proj.data[e] = torch.cat([a, b]).float(), c.float()
        name = f"model.layers.0.block_sparse_moe.experts.{e}"
        tensors |= {
            f"{name}.{w}.{key}": t for w, of in (("w1", gate), ("w3", up), ("w2", down)) for key, t in of.items()
        }
    save_file({key: t.contiguous().clone() for key, t in tensors.items()}, path / "model.safetensors")
    assert difference(load(path), with_weights(model, expected)) <= 1e-5


def embedding(rows: int, width: int, more_rows: int):
    rng = np.random.default_rng(3)
    n, values = 1 << (width - 1).bit_length(), table("shell")
    codes = rng.integers(0, 65536, (2, rows + more_rows, n // 8))
    scale, weight = rng.uniform(0.01, 0.02, rows), rng.uniform(0.2, 0.4, rows)
    sv = signs(n, rng)
    total = values[codes[0, :rows]].reshape(rows, n) + weight[:, None] * values[codes[1, :rows]].reshape(rows, n)
    dense = scale[:, None] * (total @ rotation(n)) * sv
    stored = torch.from_numpy(codes.astype(np.uint16).view(np.int16))
    tensors = {"Qidxs": stored[0], "Qidxs2": stored[1], "SV": torch.from_numpy(sv).half(), "SU": torch.ones(5).half()}
    tensors |= {"Wscale": torch.from_numpy(scale).float(), "inv_resid_scale": torch.from_numpy(weight).float()}
    return tensors, torch.from_numpy(dense[:, :width])


def test_rows_of_a_per_layer_embedding(tmp_path):
    tensors, expected = embedding(50, 96, more_rows=3)
    other, _ = Writer("e8p", 2).matrix(32, 64)
    named = {f"e.{key}": t for key, t in tensors.items()} | {f"l.{key}": t for key, t in other.items()}
    read = read_upstream(write(tmp_path / "m", {"quantization_config": Writer("e8p", 2).config}, named))
    assert worst({"e": read.weight("e", 50, 96)}, {"e": expected}) <= 1e-6
    layer = UpstreamEmbedding(read.layouts["e"], read.tables, 50, 96, 3.0, torch.float32)
    layer.load_state_dict(tensors)
    layer.settle()
    ids = torch.tensor([[0, 49, 7]])
    assert torch.allclose(layer(ids).double(), 3 * expected[ids], atol=1e-6)


# Conversion


def test_convert_says_why_codes_cannot_be_kept_and_writes_16_bits(tmp_path):
    model = llama()
    path, expected = write_model(tmp_path / "m", model, Writer("e8p", 3))
    runner = CliRunner()
    refused = runner.invoke(app, ["convert", str(path), str(tmp_path / "out")])
    assert refused.exit_code == 2
    assert "upstream mixes the rows" in refused.output
    assert not (tmp_path / "out").exists()
    done = runner.invoke(app, ["convert", str(path), str(tmp_path / "out"), "--dense"])
    assert done.exit_code == 0, done.output
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert difference(load(tmp_path / "out"), with_weights(model, expected)) <= 1e-6


def test_info_counts_what_is_stored(tmp_path):
    path, expected = write_model(tmp_path / "m", llama(), Writer("e8p", 3))
    found = inspect_upstream(path)
    tensors = load_file(path / "model.safetensors")
    packed = sum(t.numel() * t.element_size() for n, t in tensors.items() if n.rpartition(".")[0] in expected)
    assert found.nbytes == packed
    assert found.bits == 8 * packed / sum(w.numel() for w in expected.values())
    shown = CliRunner().invoke(app, ["info", str(path), "--json"])
    assert json.loads(shown.output)["bits"] == found.bits


# Checkpoints that upstream itself wrote, where there are some: --upstream-fixtures DIR


def pytest_generate_tests(metafunc):
    if "written" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--upstream-fixtures")
        found = sorted(Path(folder).glob("*/expected.safetensors")) if folder else []
        metafunc.parametrize("written", [file.parent for file in found], ids=lambda path: path.name)


def test_what_upstream_wrote(written):
    expected = load_file(written / "expected.safetensors")
    loaded = load(written)
    assert worst(held(loaded), expected) <= 1e-6
    assert difference(loaded, load(written).dequantize(loaded.dtype)) <= 0.03
    assert loaded.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False).shape[1] > 2
