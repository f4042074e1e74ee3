"""What is refused in checkpoints of upstream glq: GlqError of a line or two, before any weight is used."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from upstream_writer import Writer, llama, save_table, write_model

import glq.hf_integration
from glq import GlqError


def rezipped(path: Path, **options) -> None:
    with zipfile.ZipFile(path / "e8_codebook.pt") as old:
        content = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path / "e8_codebook.pt", "w", **options) as new:
        for name, data in content.items():
            new.writestr(name, data)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p: save_table(p, torch.zeros(7)), "table of 8 fp32 a row"),
        (lambda p: save_table(p, torch.zeros(65537, 8)), "table of 8 fp32 a row"),
        (lambda p: save_table(p, torch.zeros(16, 8), other=torch.ones(3)), "one tensor"),
        (lambda p: save_table(p, torch.full((16, 8), torch.nan)), "values that no codebook has"),
        (lambda p: save_table(p, torch.full((16, 8), 1 / 3)), "values that no codebook has"),
        (lambda p: save_table(p, torch.zeros(16, 8)), "has code .*, but the codebook 16 rows"),
        (lambda p: (p / "e8_codebook.pt").write_bytes(b"PK\x03\x04 and no more"), "is damaged"),
        (lambda p: (save_table(p, torch.zeros(16, 8)), rezipped(p, compression=zipfile.ZIP_DEFLATED)), "uncompressed"),
    ],
)
def test_tables_that_are_refused(change, match, tmp_path):
    path, _ = write_model(tmp_path / "m", llama(), Writer("e8_shell", 2))
    change(path)
    refuse(path, match)


# What is refused


def refuse(path: Path, match: str) -> None:
    with pytest.raises(GlqError, match=match) as info:
        AutoModelForCausalLM.from_pretrained(path)
    assert str(info.value).count("\n") <= 1
    assert len(str(info.value)) < 400


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("codec", "change", "match"),
    [
        ("e8_shell", lambda t: t.pop(f"{Q}.SU"), "no SU"),
        ("e8_shell", lambda t: t.pop(f"{Q}.SV"), "no SV"),
        ("e8p", lambda t: t.pop(f"{Q}.Wscale"), "no Wscale"),
        ("e8_shell", lambda t: t.pop(f"{Q}.Qidxs"), "lacks .* first model.layers.0.self_attn.q_proj.weight"),
        ("e8_shell", lambda t: t.pop(f"{Q}.inv_resid_scale"), "has Qidxs2, but no inv_resid_scale"),
        ("e8_shell", lambda t: t.pop(f"{Q}.Qidxs2"), "has inv_resid_scale, but no Qidxs2"),
        ("e8p", lambda t: t.pop(f"{Q}.Qidxs2_e8p"), "has inv_resid_scale, but no"),
        ("3inst", lambda t: t.pop(f"{Q}.inv_resid_scale2"), "has trellis_packed2, but no inv_resid_scale2"),
        ("e8_shell", lambda t: t.update({f"{Q}.weight": torch.zeros(64, 64)}), "and a plain weight"),
        ("e8_shell", lambda t: t.update({f"{Q}.Qidxs_e8p": torch.zeros(1)}), "has Qidxs and Qidxs_e8p"),
        ("e8_shell", lambda t: t.update({f"{Q}.Qidxs5": t[f"{Q}.Qidxs"]}), "Qidxs5, which is no part"),
        ("e8_shell", lambda t: t.update({f"{Q}.Qidxs": t[f"{Q}.Qidxs"][:, :-1]}), r"Qidxs should be I16 \[64, 8\]"),
        ("e8_shell", lambda t: t.update({f"{Q}.Qidxs": t[f"{Q}.Qidxs"].int()}), "found I32"),
        ("e8_shell", lambda t: t.update({f"{Q}.Qidxs2": t[f"{Q}.Qidxs2"][:-1]}), "Qidxs2 should be"),
        ("e8_shell", lambda t: t.update({f"{Q}.SV": t[f"{Q}.SV"][:-8]}), "Qidxs should be"),
        ("e8p", lambda t: t.update({f"{Q}.SU": t[f"{Q}.SU"][:-8]}), "Qidxs_e8p does not fit"),
        ("e8p", lambda t: t.update({f"{Q}.Qidxs_e8p": t[f"{Q}.Qidxs_e8p"][:1]}), "Qidxs_e8p should be"),
        ("hyb", lambda t: t.pop(f"{Q}.tlut"), "no tlut"),
        ("hyb", lambda t: t.update({f"{Q}.tlut": t[f"{Q}.tlut"][:5]}), "tlut should be"),
        ("3inst", lambda t: t.update({f"{Q}.trellis_packed": torch.zeros(16, 80).short()}), "does not fit"),
        ("3inst", lambda t: t.update({f"{Q}.trellis_packed": t[f"{Q}.trellis_packed"][1:]}), "should be"),
        ("3inst", lambda t: t.update({f"{Q}.SU": 2 * t[f"{Q}.SU"]}), "1 and −1 alone"),
        ("e8p", lambda t: t.update({f"{Q}.Wscale": torch.tensor(torch.nan)}), "NaN or infinite"),
        ("e8p", lambda t: t.update({f"{Q}.Wscale": torch.ones(7)}), "Wscale should be"),
        ("e8_shell", lambda t: t.pop("model.norm.weight"), "lacks 1 tensors .* model.norm.weight"),
        ("e8_shell", lambda t: [t.pop(n) for n in list(t) if "Qidxs" in n], "no tensor with codes"),
        ("e8_shell", lambda t: t.update({n.replace(Q, "a.b"): t[n] for n in list(t) if Q in n}), "no layer of Llama"),
    ],
)
def test_tensors_that_are_refused(codec, change, match, tmp_path):
    path, _ = write_model(tmp_path / "m", llama(), Writer(codec, 4 if codec == "hyb" else 6 if codec == "3inst" else 4))
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file)
    refuse(path, match)


@pytest.mark.parametrize(
    ("codec", "change", "match"),
    [
        ("e8_shell", {"codebook": "e9"}, "codebook 'e9' is not known"),
        ("e8_shell", {"codebook": "e8p"}, "has Qidxs, but config.json says codebook 'e8p'"),
        ("3inst", {"variant": "4inst"}, "variant '4inst' is not known"),
        ("3inst", {"trellis_layout": None}, "trellis_layout is None"),
        ("3inst", {"trellis_layout": "rows"}, "trellis_layout is 'rows'"),
        ("3inst", {"variant": "hyb"}, "has no tlut"),
    ],
)
def test_configs_that_are_refused(codec, change, match, tmp_path):
    path, _ = write_model(tmp_path / "m", llama(), Writer(codec, 2))
    raw = json.loads((path / "config.json").read_text())
    raw["quantization_config"] = {k: v for k, v in (raw["quantization_config"] | change).items() if v is not None}
    (path / "config.json").write_text(json.dumps(raw))
    refuse(path, match)


def test_a_model_of_other_sizes_is_refused(tmp_path):
    path, _ = write_model(tmp_path / "m", llama(), Writer("e8_shell", 2))
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | {"intermediate_size": 104}))
    refuse(path, "a matrix of 64 × 96 with its padding, the model one of 64 × 104|of 96 × 64")


def test_glqs_own_commands_say_that_it_is_another_format(tmp_path):
    path, _ = write_model(tmp_path / "m", llama(), Writer("e8_shell", 2))
    with pytest.raises(GlqError, match="is upstream glq's"):
        glq.inspect(path)
