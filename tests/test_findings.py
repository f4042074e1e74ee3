"""What could go wrong unseen is found, said by name, and handled by its rule."""

import json

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file
from torch import nn

import glq.findings
from glq import Settings, quantize
from glq.codecs import CODECS
from glq.moments import Moments, Sums
from glq.rounder import round_layers

CODEC = CODECS["nested-3"]
SETTINGS = Settings(3, "nested-3", tokens=256, ctx=64)


def layer(rows: int, cols: int) -> nn.Linear:
    module = nn.Linear(cols, rows, bias=False)
    module.weight.requires_grad_(False)
    return module


def moments(width: int, rank: int | None = None) -> Moments:
    x = torch.randn(rank or 4 * width, width)
    return Moments(x.T @ x / len(x), torch.zeros(width, width))


def test_nothing_is_found_where_nothing_is_wrong(tiny_checkpoint):
    assert "findings" not in json.loads((tiny_checkpoint / "quantization.json").read_text())


def test_findings_are_in_the_record_by_name(text_file, tmp_path):
    model = make_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][[7, 9]] = 0
    tensors["model.layers.1.mlp.up_proj.weight"][:] = 0
    tensors["model.layers.1.input_layernorm.weight"][3] = 1e6
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = quantize(model, tmp_path / "out", SETTINGS, calibration=text_file, device="cpu")
    found = json.loads((tmp_path / "out" / "quantization.json").read_text())["findings"]
    assert found == result.findings
    names = [", ".join(f"model.layers.{i}.self_attn.{key}_proj" for key in "qkv") for i in range(2)]
    assert found[names[0]] == ["2 of 96 channels it reads are always zero: their weights are rounded, but not fitted"]
    assert "beyond fp16" in found[names[1]][0]
    assert "nothing but zeros" in found["model.layers.1.mlp.down_proj"][0]
    assert set(found) <= {*names, "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj", "model.layers.1"}


def test_an_ill_conditioned_hessian_is_named_and_damped_more():
    h = torch.eye(64) - 1.5 * torch.ones(64, 64) / 64  # an eigenvalue of −0.5
    found: list[str] = []
    round_layers([layer(32, 64)], Moments(h, torch.zeros(64, 64)), CODEC, 0, 0.1, found=found)
    assert found == ["ill-conditioned Hessian: damped by 1 instead of 0.1"] or "damped by 10 " in found[0]


def test_rounding_that_loses_more_than_plain_rounding_gives_way_to_it(monkeypatch):
    """A feedback that is wrong: what is kept then is plain rounding."""
    import glq.rounder

    problem = [layer(64, 128)], moments(128), CODEC, 0, 0.1
    _, good = round_layers(*problem)
    original = glq.rounder.damped_factor
    bad = torch.randn(128, 128, dtype=torch.float64).triu(1) + torch.eye(128, dtype=torch.float64)
    monkeypatch.setattr(glq.rounder, "damped_factor", lambda h, d: (bad, original(h, d)[1]))
    monkeypatch.setattr(glq.rounder, "HALF_STEP", 0)
    found: list[str] = []
    _, lost = round_layers(*problem, found=found)
    assert len(found) == 1
    assert "where plain rounding is expected to lose" in found[0]
    assert good < lost < 1.5 * glq.findings.expected_loss(torch.ones(1, 1), torch.ones(1, 1), CODEC.mse)


def test_the_largest_input_is_kept():
    sums = Sums()
    x = torch.randn(10, 8)
    x[3, 4] = -70000
    sums.add(x[:5], x[:5])
    sums.add(x[5:], x[5:])
    assert sums.mean().largest == 70000
    assert not glq.findings.of_states([torch.ones(2)])
    assert glq.findings.of_states([torch.ones(2), torch.full((2,), torch.nan)])


def test_a_log_of_json_lines(tiny_model, text_file, tmp_path):
    from typer.testing import CliRunner

    from glq.cli import app

    line = ["quantize", str(tiny_model), str(tmp_path / "out"), "--codec", "nested-3", "--tokens", "256", "--ctx", "64"]
    line += ["--device", "cpu", "--calibration", str(text_file), "--log-json", str(tmp_path / "log")]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    steps = [json.loads(step) for step in (tmp_path / "log").read_text().splitlines()]
    assert [step["done"] for step in steps] == list(range(1, 9))
    assert steps[-1]["layer"] == "model.layers.1.mlp.down_proj"
    assert 0 < steps[-1]["error"] < 0.1
    assert steps[-1]["peak_bytes"] > 1e8
    assert steps[-1]["seconds"] == pytest.approx(max(step["seconds"] for step in steps))
    assert done.stderr == ""
