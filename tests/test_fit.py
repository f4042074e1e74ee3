"""--fit: bytes counted without data are those that loading and generating really take."""

import math
import re

import pytest
import torch
from conftest import make_model, make_moe
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from typer.testing import CliRunner

import glq.hf_integration  # noqa: F401
from glq import GlqCache, GlqError, Settings, footprint, quantize
from glq.arguments import format_bytes, parse_bytes
from glq.cli import app
from glq.fitting import Option, _best, fit
from glq.footprint import Footprint, Rates, _Tally, context_bytes, weight_bytes
from glq.packed import PACKED_DTYPES, packed_shapes
from glq.pipeline import Result
from glq.source import SourceModel

runner = CliRunner()
CONTEXT = 200


@pytest.fixture(scope="module")
def tied(text_file, tmp_path_factory):
    """A model with one matrix for embeddings and lm_head, and its checkpoint with that at 4 bits."""
    folder = tmp_path_factory.mktemp("tied")
    model = make_model(folder / "model", tie_word_embeddings=True, attention_bias=True)
    settings = Settings(2, "e8-2", tokens=256, ctx=64, embeddings=4)
    quantize(model, folder / "out", settings, calibration=text_file, device="cpu")
    return model, folder / "out"


def loaded_bytes(model) -> int:
    tensors = {t.untyped_storage().data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    names = {id(t) for name, t in model.named_buffers() if "inv_freq" in name}
    return sum(t.untyped_storage().nbytes() for t in tensors.values() if id(t) not in names)


@pytest.mark.parametrize("kind", ["tiny", "tied"])
def test_weights_are_those_of_the_loaded_model(kind, tiny_model, tiny_checkpoint, tied):
    model, checkpoint = (tiny_model, tiny_checkpoint) if kind == "tiny" else tied
    rates = Rates("trellis-3") if kind == "tiny" else Rates("e8-2", "trellis-4", "trellis-4")
    counted = weight_bytes(SourceModel(model), rates)
    loaded = loaded_bytes(AutoModelForCausalLM.from_pretrained(checkpoint))
    assert loaded - 512 * 2 <= counted <= loaded  # joined layers have their scales padded to whole tiles
    plain = AutoModelForCausalLM.from_pretrained(model)
    assert weight_bytes(SourceModel(model), None) == sum(p.nbytes for p in plain.parameters())


def test_experts_are_counted_one_by_one(tmp_path):
    source = SourceModel(make_moe(tmp_path / "model", "qwen3-moe"))
    expected = 0
    for name in source.files:
        weight = source.read(name)
        entry = re.sub(r"experts\.\d+", "experts.*", name.removesuffix(".weight"))
        shapes = packed_shapes("trellis-3", *weight.shape) if entry in source.layers else {}
        sizes = {key: math.prod(shape) * PACKED_DTYPES[key].itemsize for key, shape in shapes.items()}
        expected += sum(sizes.values()) or weight.nbytes
    assert weight_bytes(source, Rates("trellis-3")) == expected
    kv, activations = context_bytes(source, Rates("trellis-3"), CONTEXT, None)
    assert kv == 2 * 2 * 2 * 32 * CONTEXT * 2  # layers, keys and values, heads, channels, tokens, bytes
    assert activations > footprint.WORKSPACE


@pytest.mark.parametrize("kv_bits", [None, 4])
@pytest.mark.parametrize("kind", ["tiny", "tied"])
def test_a_pass_without_data_takes_what_a_real_one_takes(kind, kv_bits, tiny_model, tiny_checkpoint, tied, monkeypatch):
    """The real one on a CPU, where products hold nothing on the way that can be seen."""
    model, checkpoint = (tiny_model, tiny_checkpoint) if kind == "tiny" else tied
    rates = Rates("trellis-3") if kind == "tiny" else Rates("e8-2", "trellis-4", "trellis-4")
    monkeypatch.setattr(footprint, "_product", lambda x, rows: x.new_empty(*x.shape[:-1], rows))
    monkeypatch.setattr(footprint, "embedding_reference", lambda ids, codes, *a: codes.new_empty(len(ids), 96))
    source = SourceModel(model)
    kv, activations = context_bytes(source, rates, CONTEXT, kv_bits)
    real = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = real.config
    cache = DynamicCache(config=config) if kv_bits is None else GlqCache(kv_bits, config=config)
    with torch.no_grad(), footprint._Attention(), _Tally() as tally:
        for tokens in (CONTEXT - 1, 1):
            ids = torch.zeros(1, tokens, dtype=torch.long)
            real(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    held = cache.nbytes if kv_bits else sum(x.nbytes for one in cache.layers for x in (one.keys, one.values))
    assert kv == held
    assert kv + activations - footprint.WORKSPACE == pytest.approx(tally.peak, rel=0.03)


def test_a_long_context_takes_more_and_a_large_matrix_is_decoded(tiny_model):
    source = SourceModel(tiny_model)
    short, long = (context_bytes(source, Rates("trellis-3"), n, None) for n in (64, 256))
    assert long[0] == 4 * short[0]
    assert long[1] > short[1]
    x = torch.empty(512, 4096, dtype=torch.bfloat16, device="meta")
    with _Tally() as tally:
        footprint._product(x, 8192)
    assert tally.peak == 2 * 512 * 4096 + 2 * 512 * 8192 + 2 * 8192 * 4096  # x rotated, y, W


def test_a_model_that_looks_at_its_data_is_refused_in_a_line(tiny_model, monkeypatch):
    source = SourceModel(tiny_model)
    monkeypatch.setattr(type(source.model.model.layers[0]), "forward", lambda self, x, **_: x[x > 0])
    with pytest.raises(GlqError, match="a 'llama' model takes cannot be counted without data .* choose --bits"):
        context_bytes(source, None, CONTEXT, None)


def test_amounts_of_memory():
    assert parse_bytes("12GB") == 12 * 10**9
    assert parse_bytes(" 1.5 GiB") == 3 * 2**29
    assert parse_bytes("800mb") == 8 * 10**8
    assert parse_bytes("500B") == 500
    for wrong in ("", "12 gigs", "-3GB", "0GB", "1e9", "12", "12iB"):
        with pytest.raises(GlqError, match="an amount of memory is like"):
            parse_bytes(wrong)
    assert [format_bytes(n) for n in (999, 950_000, 12 * 10**9)] == ["999 bytes", "0.9 MB", "12.00 GB"]


def test_embeddings_are_packed_where_that_gains_half_a_bit():
    one = Footprint(1, 1, 1)
    assert _best([Option(4, None, one), Option(4, 4, one)]).outside is None
    assert _best([Option(4, 4, one), Option(3.75, None, one)]).outside is None
    assert _best([Option(4, 4, one), Option(3.5, None, one)]).outside == 4
    assert _best([Option(2, 4, one)]).outside == 4


def test_the_highest_rate_that_fits_is_taken(tiny_model):
    everything = fit(tiny_model, 10**9, CONTEXT)
    assert (everything.best.bits, everything.best.outside) == (4, None)
    least = min(option.footprint.total for option in everything.options)
    tight = fit(tiny_model, int(least / 0.95) + 1, CONTEXT)
    assert tight.best.bits == 1.5
    assert tight.best.footprint.total == least
    with pytest.raises(GlqError, match="does not fit into 36.* MB: at 1.5 bits.* it takes .* Take a shorter --context"):
        fit(tiny_model, int(least / 0.95) - 100, CONTEXT)
    with pytest.raises(GlqError, match="into 1.0 MB: .* No --context is short enough: take a smaller model"):
        fit(tiny_model, 10**6, CONTEXT)
    with pytest.raises(GlqError, match="reads at most 256 tokens: --context 257 is more"):
        fit(tiny_model, 10**9, 257)


def test_commands_say_what_fits_and_do_it(tiny_model, tmp_path, monkeypatch):
    least = min(option.footprint.total for option in fit(tiny_model, 10**9, CONTEXT).options)
    amount = f"{least / 0.95 / 1e6 + 0.001:.6f}MB"
    options = ["--fit", amount, "--context", str(CONTEXT)]
    planned = runner.invoke(app, ["plan", str(tiny_model), *options])
    assert planned.exit_code == 0, planned.output
    assert "glq quantize" in planned.output
    assert "--bits 1.5\n" in planned.output
    asked = {}

    def record(model, out, settings, **kwargs):
        asked["settings"] = settings
        return Result(out, 1.5, 0.0, 0, {})

    monkeypatch.setattr("glq.recipe.quantize", record)
    made = runner.invoke(app, ["quantize", str(tiny_model), str(tmp_path / "out"), *options])
    assert made.exit_code == 0, made.output
    assert (asked["settings"].bits, asked["settings"].embeddings) == (1.5, None)
    refused = runner.invoke(app, ["quantize", str(tiny_model), str(tmp_path / "x"), *options, "--bits", "3"])
    assert refused.exit_code == 2
    assert "leave these out, or leave out --fit" in refused.stderr
    nothing = runner.invoke(app, ["plan", str(tiny_model)])
    assert nothing.exit_code == 2
    assert "--fit 12GB" in nothing.stderr


def test_it_is_said_when_the_original_fits(tiny_model):
    result = runner.invoke(app, ["plan", str(tiny_model), "--fit", "1GB", "--context", "64"])
    assert result.exit_code == 0, result.output
    assert "the original fits as it is" in result.output
