"""Quantized embeddings and lm_head: the op, both ways of tying, what is written, loaded, tuned and turned back."""

import pytest
import torch
from conftest import make_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

import glq
from glq import GlqError, Settings, TuneSettings
from glq.codecs import CODECS
from glq.embedding import QuantEmbedding, TiedHead, embedding_scale
from glq.linear import QuantLinear
from glq.ops.embedding import embedding
from glq.packed import PackedLinear, packed_shapes


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kwargs).eval()


def random_packed(codec: str, rows: int, cols: int, block: int) -> PackedLinear:
    shapes = packed_shapes(codec, rows, cols)
    codes, signs = (torch.randint(0, 256, shapes[key], dtype=torch.uint8) for key in ("codes", "signs"))
    return PackedLinear(codec, rows, cols, block, codes, torch.rand(rows).add(0.5).half(), signs)


@pytest.mark.parametrize("codec", CODECS)
def test_the_op_reads_rows(codec):
    p = random_packed(codec, 150, 96, 96)
    ids = torch.tensor([[0, 149, 64], [63, 7, 7]])
    rows = embedding(ids, p.codes, p.scale, p.signs, codec, 96, 96, torch.float32)
    torch.testing.assert_close(rows, p.dequantize()[ids], rtol=1e-5, atol=1e-5)
    many = torch.randint(0, 150, (600,))
    half = embedding(many, p.codes, p.scale, p.signs, codec, 96, 96, torch.float16)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), p.dequantize()[many], rtol=1e-3, atol=1e-3)


def test_opcheck():
    p = random_packed("trellis-2", 64, 128, 128)
    ids = torch.tensor([[1, 2], [3, 63]])
    torch.library.opcheck(embedding, (ids, p.codes, p.scale, p.signs, p.codec, 128, 128, torch.bfloat16))


@pytest.fixture(scope="module", params=["tied", "untied"])
def pair(request, text_file, tmp_path_factory):
    """A model and its checkpoint with embeddings and head at 4 bits."""
    folder = tmp_path_factory.mktemp(request.param)
    tied = request.param == "tied"
    model = make_model(folder / "model", tie_word_embeddings=tied)
    rates = {"head": 4.0} if tied else {"head": 4.0, "embeddings": 3.0}
    settings = Settings(bits=4, tokens=512, ctx=64, **rates)
    glq.quantize(model, folder / "out", settings, calibration=text_file, device="cpu")
    return model, folder / "out", tied


def test_nothing_is_stored_in_16_bits_but_norms(pair):
    _, out, tied = pair
    summary = glq.inspect(out)
    with safe_open(out / "model.safetensors", "pt") as f:
        plain = {name: f.get_tensor(name).ndim for name in f.keys() if name.endswith(".weight")}  # noqa: SIM118
    assert set(plain.values()) == {1}
    codecs = {name: module.codec for name, module in summary.config.modules.items() if "layers" not in name}
    if tied:
        assert codecs == {"model.embed_tokens": "trellis-4"}
    else:
        assert codecs == {"model.embed_tokens": "trellis-3", "lm_head": "trellis-4"}
    assert summary.quantized_weights == sum(m.weights for m in summary.config.modules.values())


def test_loaded_logits_are_those_of_the_dequantized_weights(pair):
    model, out, tied = pair
    packed, fake = load(out), load(model)
    assert isinstance(packed.model.embed_tokens, QuantEmbedding)
    assert isinstance(packed.lm_head, TiedHead if tied else QuantLinear)
    for name, module in packed.named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding):
            fake.get_submodule(name).weight.data = module.packed.dequantize()
    ids = torch.arange(100)[None]
    y, z, reference = packed(ids).logits, fake(ids).logits, load(model)(ids).logits
    assert (y - z).abs().max() / z.abs().max() < 1e-5
    assert 0 < (z - reference).norm() / reference.norm() < 0.25
    dense = load(out).dequantize(torch.float32)
    assert not [m for m in dense.modules() if isinstance(m, QuantLinear | QuantEmbedding | TiedHead)]
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) == tied
    assert (dense(ids).logits - z).abs().max() / z.abs().max() < 1e-5


def test_half_precision_saving_and_generation(pair, tmp_path):
    _, out, _ = pair
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert model(torch.arange(8)[None]).logits.dtype == torch.bfloat16
    model = load(out)
    tokens = model.generate(torch.arange(5)[None], max_new_tokens=6, do_sample=False)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(again.generate(torch.arange(5)[None], max_new_tokens=6, do_sample=False), tokens)


def test_evaluation_and_tuning_take_them(pair, text_file, tmp_path):
    model, out, _ = pair
    settings = TuneSettings(steps=4, batch=4, ctx=64)
    result = glq.tune(out, tmp_path / "tuned", model, settings, text=text_file, device="cpu")
    assert result.after <= result.before
    scores = glq.evaluate(model, [out, tmp_path / "tuned"], text=text_file, tokens=256, ctx=64, device="cpu")
    assert all(0 < score.kl < 1 for score in scores[1:])


def test_rates_that_do_not_exist_or_differ_where_they_are_tied(text_file, tmp_path):
    with pytest.raises(GlqError, match="embeddings and head take one of 1.5"):
        Settings(head=5)
    model = make_model(tmp_path / "model", tie_word_embeddings=True)
    settings = Settings(embeddings=2, head=4, tokens=512, ctx=64)
    with pytest.raises(GlqError, match="one matrix here"):
        glq.quantize(model, tmp_path / "out", settings, calibration=text_file, device="cpu")


def test_the_factor_of_scaled_embeddings():
    class Scaled(nn.Embedding):
        scalar_embed_scale = 8.0

    class Odd(nn.Embedding):
        pass

    assert embedding_scale(nn.Embedding(3, 4)) == 1
    assert embedding_scale(Scaled(3, 4)) == 8
    with pytest.raises(GlqError, match="of type Odd cannot be quantized"):
        embedding_scale(Odd(3, 4))
    quantized = QuantEmbedding(64, 64, "e8-2", 64, 8.0)
    quantized.codes.random_(0, 256)
    quantized.scale.fill_(1)
    ids = torch.arange(64)
    torch.testing.assert_close(quantized(ids).float(), 8 * quantized.packed.dequantize(), rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(quantized.dequantize(torch.float32)(ids), 8 * quantized.packed.dequantize())
