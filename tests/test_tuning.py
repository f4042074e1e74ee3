"""Tuning: it lowers the divergence on text it never saw, changes scales and norms only, and stops by itself."""

import pytest
import torch
from safetensors.torch import load_file

import glq
from glq import GlqError, Settings, TuneSettings, tuning
from glq.checkpoint import inspect


@pytest.fixture(scope="module")
def long_text(text_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "long.txt"
    words = torch.randint(0, 90, (6000,), generator=torch.Generator().manual_seed(3)).tolist()
    path.write_text(text_file.read_text() + " " + " ".join(f"w{w}" for w in words))
    return path


@pytest.fixture(scope="module")
def two_bits(tiny_model, long_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "bits"
    glq.quantize(tiny_model, out, Settings(bits=2, tokens=512, ctx=64), calibration=long_text, device="cpu")
    return out


def test_tuning_lowers_the_divergence_and_leaves_the_codes_alone(tiny_model, two_bits, long_text, tmp_path):
    seen = []
    settings = TuneSettings(steps=40, batch=8, ctx=64)
    result = glq.tune(
        two_bits, tmp_path / "out", tiny_model, settings, text=long_text, device="cpu", progress=seen.append
    )
    assert result.after < result.before
    assert result.step > 0
    assert [p.done for p in seen] == list(range(1, len(seen) + 1))
    before, after = (load_file(d / "model.safetensors") for d in (two_bits, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed
    assert all(name.endswith(".scale") or before[name].ndim == 1 for name in changed)
    assert inspect(tmp_path / "out").bits == inspect(two_bits).bits
    scores = glq.evaluate(tiny_model, [two_bits, tmp_path / "out"], text=long_text, tokens=1024, ctx=64, device="cpu")
    assert scores[2].kl < scores[1].kl


def test_quantize_and_tune_in_one_go_is_the_same(tiny_model, two_bits, long_text, tmp_path):
    tuning = TuneSettings(steps=4, batch=4, ctx=64)
    glq.tune(two_bits, tmp_path / "apart", tiny_model, tuning, text=long_text, device="cpu")
    settings = Settings(bits=2, tokens=512, ctx=64)
    result = glq.quantize(
        tiny_model, tmp_path / "together", settings, calibration=long_text, device="cpu", tuning=tuning
    )
    assert result.tuned is not None
    assert result.path == tmp_path / "together"
    apart, together = (load_file(tmp_path / d / "model.safetensors") for d in ("apart", "together"))
    assert all(torch.equal(apart[name], together[name]) for name in apart)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["apart", "together"]


def test_too_large_steps_are_not_kept(tiny_model, two_bits, long_text, tmp_path):
    wild = TuneSettings(steps=16, batch=2, ctx=64, learning_rate=10.0, patience=2)
    seen = []
    result = glq.tune(two_bits, tmp_path / "out", tiny_model, wild, text=long_text, device="cpu", progress=seen.append)
    assert result.step == 0
    assert result.after == result.before
    assert len(seen) < 16  # patience ended it


def test_too_little_text_is_refused(tiny_model, two_bits, tmp_path):
    (tmp_path / "short.txt").write_text("w1 w2 w3 " * 100)
    with pytest.raises(GlqError, match="tuning needs at least 12 windows of 64 tokens"):
        glq.tune(
            two_bits, tmp_path / "out", tiny_model, TuneSettings(ctx=64), text=tmp_path / "short.txt", device="cpu"
        )
    assert not (tmp_path / "out").exists()


def test_existing_output_is_refused_before_any_work(tiny_model, two_bits, long_text):
    with pytest.raises(GlqError, match="exists and is not an empty directory"):
        glq.tune(two_bits, two_bits, tiny_model, TuneSettings(ctx=64), text=long_text, device="cpu")


def test_tuning_on_what_the_reference_writes(tiny_model, two_bits, long_text, tmp_path):
    seen = []
    settings = TuneSettings(steps=24, batch=8, sampled=32, ctx=64, learning_rate=3e-3)
    result = glq.tune(
        two_bits, tmp_path / "out", tiny_model, settings, text=long_text, device="cpu", progress=seen.append
    )
    assert result.after < result.before
    assert {p.stage for p in seen} == {"sampling", "tuning"}


def test_tuning_in_bf16(tiny_model, two_bits, long_text, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_precision", lambda model, device: torch.bfloat16)
    settings = TuneSettings(steps=24, batch=8, ctx=64, learning_rate=3e-3)
    result = glq.tune(two_bits, tmp_path / "out", tiny_model, settings, text=long_text, device="cpu")
    assert result.after < 0.98 * result.before


def test_steps_are_relative_to_a_parameters_size():
    sizes = {"norm.weight": 40.0, "bias": 0.01, "fresh.bias": 0.0, "layer.gain": 0.0}
    trainable = {name: torch.nn.Parameter(torch.full((8,), size)) for name, size in sizes.items()}
    optimizer = torch.optim.AdamW(tuning._groups(trainable, 0.1), weight_decay=0.0)
    sum(p.sum() for p in trainable.values()).backward()
    optimizer.step()
    moved = {name: (sizes[name] - p).mean().item() for name, p in trainable.items()}
    assert moved == pytest.approx({"norm.weight": 4.0, "bias": 0.001, "fresh.bias": 0.1, "layer.gain": 0.1}, rel=1e-4)


def test_the_gradient_is_that_of_the_divergence(tiny_model, two_bits, monkeypatch):
    monkeypatch.setattr(tuning, "_CHUNK", 50)
    teacher, student = (tuning._load(path, torch.device("cpu"), torch.float32) for path in (tiny_model, two_bits))
    trainable = tuning._make_tunable(student, torch.float32)
    ids = torch.randint(2, 300, (3, 64))
    value = tuning._backward(student, teacher, ids)
    log_p, log_q = (m(ids).logits.log_softmax(-1) for m in (teacher, student))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert value == pytest.approx(expected.item(), rel=1e-4)
    for found, p in zip(torch.autograd.grad(expected, list(trainable.values())), trainable.values(), strict=True):
        torch.testing.assert_close(found, p.grad, rtol=1e-3, atol=1e-6)
