"""Checkpoints of upstream glq in odd sizes, rates and forms, held to matrices that the tests multiply out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file
from test_upstream import difference, embedding, held, load, worst
from upstream_writer import Writer, halved, llama, moe, signs, with_weights, write_model

ODD = {"hidden_size": 72, "intermediate_size": 100, "head_dim": 36}
HALVED = ("SU", *(f"Qidxs{s}{kind}" for s in ("", "2", "3", "4") for kind in ("", "_e8p", "_e81b")))
HALVED += ("trellis_packed", "trellis_packed2")


class Mixed(Writer):
    """Another rate in every matrix."""

    def matrix(self, rows: int, columns: int):
        self.bits = 2 + (self.bits - 1) % 7
        return super().matrix(rows, columns)


@pytest.mark.parametrize("bits", [3, 4, 7])
@pytest.mark.parametrize("legacy", [False, True], ids=["blocks", "powers of two"])
def test_e8p_fills_up_what_is_no_multiple_of_its_tiles(legacy, bits, tmp_path):
    model = llama(**ODD)
    path, expected = write_model(tmp_path / "m", model, Writer("e8p", bits, legacy=legacy))
    loaded = load(path)
    assert worst(held(loaded), expected) <= 1e-6
    assert difference(loaded, with_weights(model, expected)) <= 1e-5


@pytest.mark.parametrize(("codec", "sizes"), [("e8_shell", ODD), ("e8p", ODD), ("e8_relaxed", {})])
def test_other_rates_in_every_layer(codec, sizes, tmp_path):
    model = llama(num_hidden_layers=2, tie_word_embeddings=False, **sizes)
    path, expected = write_model(tmp_path / "m", model, Mixed(codec, 2))
    loaded = load(path)
    assert worst(held(loaded), expected) <= 1e-6
    assert difference(loaded, with_weights(model, expected)) <= 1e-5


@pytest.mark.parametrize(
    ("codec", "bits"), [("3inst", 6), ("3inst", 7), ("hyb", 5), ("hyb", 6), ("hyb", 7), ("hyb", 3)]
)
def test_a_trellis_of_two_stages_in_blocks_of_several_sizes(codec, bits, tmp_path):
    model = llama(hidden_size=96, intermediate_size=160, head_dim=32, num_attention_heads=3)
    path, expected = write_model(tmp_path / "m", model, Writer(codec, bits))
    assert worst(held(load(path)), expected) <= 1e-6


def edited(path: Path, config=None, tensors=None) -> None:
    """Change config.json and the tensors of a checkpoint in place."""
    raw = json.loads((path / "config.json").read_text())
    (config or (lambda _: None))(raw)
    (path / "config.json").write_text(json.dumps(raw))
    found = load_file(path / "model.safetensors")
    (tensors or (lambda _: None))(found)
    save_file({name: t.contiguous().clone() for name, t in found.items()}, path / "model.safetensors")


@pytest.mark.parametrize("codec", ["e8_shell", "e8p", "hyb"])
def test_a_config_of_the_least_keys_and_scales_of_one_element(codec, tmp_path):
    path, expected = write_model(tmp_path / "m", llama(), Writer(codec, 4))

    def config(raw):
        raw["quantization_config"] = {key: raw["quantization_config"][key] for key in ("quant_method", "codebook")}
        for key in ("tie_word_embeddings", "bpw", "architectures"):
            raw.pop(key, None)

    def tensors(found):
        for name in [name for name in found if found[name].ndim == 0]:
            found[name] = found[name].view(1)
        found["lm_head.weight"] = found["model.embed_tokens.weight"]

    edited(path, config, tensors)
    assert worst(held(load(path)), expected) <= 1e-6


def test_a_matrix_whose_tensors_are_in_several_files(tmp_path):
    path, expected = write_model(tmp_path / "m", llama(), Mixed("e8p", 2))
    tensors, index = load_file(path / "model.safetensors"), {}
    (path / "model.safetensors").unlink()
    for i in range(3):
        part = dict(sorted(tensors.items())[i::3])
        save_file(part, path / f"model-{i}.safetensors")
        index |= dict.fromkeys(part, f"model-{i}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert worst(held(load(path)), expected) <= 1e-6


@pytest.mark.parametrize(
    ("codec", "bits", "inside"),
    [("e8_shell", 5, 48), ("e8_shell", 6, 40), ("e8p", 5, 48), ("e8p", 8, 80), ("3inst", 6, 96), ("hyb", 4, 32)],
)
def test_gate_and_up_that_were_one_matrix_of_several_blocks(codec, bits, inside, tmp_path):
    """The rotation of 2 I rows has other blocks than two of I rows."""
    model = moe(moe_intermediate_size=inside)
    writer = Writer(codec, bits)
    path, expected = write_model(tmp_path / "m", model, writer)
    experts, name = model.model.layers[0].mlp.experts, "model.layers.0.mlp.experts"

    def tensors(found):
        for key in ("gate_up_proj", "down_proj"):
            found.pop(f"{name}.{key}")
        for e in range(3):
            made, weight = writer.matrix(2 * inside, 64)
            before, made["SU"] = made["SU"], torch.from_numpy(signs(2 * inside, np.random.default_rng(5))).half()
            experts.gate_up_proj.data[e] = (weight * (made["SU"] * before)[:, None]).float()
            parts = dict(zip(("gate_proj", "up_proj"), halved(made, HALVED), strict=True))
            parts["down_proj"], down = writer.matrix(64, inside)
            experts.down_proj.data[e] = down.float()
            found |= {f"{name}.{e}.{part}.{key}": t for part, of in parts.items() for key, t in of.items()}

    edited(path, tensors=tensors)
    plain = with_weights(model, expected)
    assert difference(load(path), plain) <= 1e-5
    assert difference(load(path).dequantize(torch.float32), plain) <= 1e-5


@pytest.mark.parametrize("codec", ["e8_shell", "e8p"])
def test_gemma_4_with_embeddings_of_each_layer_and_shared_keys(codec, tmp_path):
    """Older versions of transformers had projections that later layers do not use; what is stored for them is left."""
    architecture = next(a for a in ARCHITECTURES if a.name.startswith("Gemma 4 (E4B"))
    model = architecture.build().float()
    writer, name = Mixed(codec, 2), "model.language_model"
    kept = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and f"{name}.layers." not in n]
    path, expected = write_model(tmp_path / "m", model, writer, tuple(kept))
    plain = {key: t for key, t in model.state_dict().items() if key.startswith(tuple(kept))}
    made, weight = embedding(*model.get_parameter(f"{name}.embed_tokens_per_layer.weight").shape, more_rows=2)

    def tensors(found):
        found.pop(f"{name}.embed_tokens_per_layer.weight")
        found |= plain | {f"{name}.embed_tokens_per_layer.{key}": t for key, t in made.items()}
        for key in ("k_proj", "v_proj"):
            unused, _ = writer.matrix(32, 64)
            found |= {f"{name}.layers.3.self_attn.{key}.{ending}": t for ending, t in unused.items()}
        found[f"{name}.layers.3.self_attn.k_norm.weight"] = torch.ones(32)

    edited(path, tensors=tensors)
    loaded = load(path)
    expected[f"{name}.embed_tokens_per_layer"] = weight
    assert worst(held(loaded), expected) <= 1e-6
    assert difference(loaded, with_weights(model, expected)) <= 1e-4
