"""Sensitivities: what is measured is what rounding really costs."""

import pytest
import torch

from glq import Settings, quantize
from glq import sensitivity as module
from glq.calibration import read_text, windows
from glq.codecs import CODECS
from glq.evaluation import evaluate
from glq.hub import load_tokenizer
from glq.machine import pick_device
from glq.sensitivity import measure
from glq.source import SourceModel

CPU = pick_device("cpu")


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(module, "_TOKENS", {"cpu": (2048, 1024)})


def test_groups_come_in_order_with_what_each_stores(tiny_model, text_file):
    groups = measure(tiny_model, Settings(ctx=64), calibration=text_file, device="cpu")
    assert [len(g.layers) for g in groups] == [3, 1, 2, 1] * 2
    assert groups[0].layers[0] == "model.layers.0.self_attn.q_proj"
    assert groups[7].layers == ("model.layers.1.mlp.down_proj",)
    assert groups[2].shapes == ((200, 96), (200, 96))
    assert all(g.sensitivity > 0 for g in groups)


def test_a_group_in_no_use_costs_nothing(tiny_model, text_file, monkeypatch):
    """A block whose output projection is zero: what comes before that does not matter."""
    monkeypatch.setattr(module, "_AT_ONCE", {"cpu": 1})
    plain = SourceModel.read

    def read(self, name):
        value = plain(self, name)
        return torch.zeros_like(value) if name == "model.layers.1.mlp.down_proj.weight" else value

    monkeypatch.setattr(SourceModel, "read", read)
    groups = {g.layers[-1]: g.sensitivity for g in measure(tiny_model, Settings(ctx=64), calibration=text_file)}
    assert groups["model.layers.1.mlp.up_proj"] == pytest.approx(0, abs=1e-9)
    assert groups["model.layers.1.mlp.down_proj"] == pytest.approx(0, abs=1e-9)
    assert groups["model.layers.1.self_attn.o_proj"] > 1e-6


def test_sensitivities_predict_what_the_rounded_model_loses(tiny_model, text_file, tmp_path):
    settings = Settings(bits=2, codec="e8-2", tokens=2048, ctx=64)
    groups = measure(tiny_model, settings, calibration=text_file, device="cpu")
    predicted = sum(g.sensitivity for g in groups) * CODECS["e8-2"].mse
    quantize(tiny_model, tmp_path / "out", settings, calibration=text_file, device="cpu")
    _, score = evaluate(tiny_model, [tmp_path / "out"], text=text_file, tokens=2048, ctx=64, device="cpu")
    assert predicted == pytest.approx(score.kl, rel=0.35)


def test_the_tokens_set_aside_are_spread_and_all_are_used(tiny_model, text_file):
    text = read_text(text_file)
    bench = module._Bench(tiny_model, text, Settings(ctx=64), CPU)
    ids = windows(load_tokenizer(tiny_model), text, 48, 64, spread=True)
    used = torch.cat(bench._batches)
    assert sorted(map(tuple, used.tolist())) == sorted(map(tuple, ids.tolist()))
    aside = torch.cat(bench._batches[-bench._held_out :])
    assert len(aside) == 16
    assert (aside[0] == ids[0]).all()
    assert any((aside[-1] == window).all() for window in ids[-4:])
