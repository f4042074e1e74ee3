"""GlqCache in transformers: what generate does with a cache, done on codes."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma3 import Gemma3ForCausalLM

from glq import GlqCache, GlqError
from glq.kv.cache import cache_keyword
from glq.kv.centre import Centre
from glq.kv.codec import kv_codec


@pytest.fixture(scope="module")
def model(tiny_model):
    """4 heads of 24 channels, 2 of keys and values, on 2 layers."""
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def gemma():
    """A sliding window of 16 on one of two layers."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=302, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=32, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=256, bos_token_id=0, eos_token_id=None, pad_token_id=1,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    for layer in model.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            norm.weight.data.normal_()
    return model


class Exact:
    """Loses nothing: words are fp32 vectors, as bytes."""

    def encode(self, x):
        return x.float().contiguous().view(torch.uint8), x.new_ones(x.shape[:-1], dtype=torch.float16)

    def decode(self, words, scales, dtype=torch.float32):
        assert (scales == 1).all()
        return words.contiguous().view(torch.float32).to(dtype)


@pytest.fixture
def exact(monkeypatch):
    """What then differs from DynamicCache is a mistake."""
    monkeypatch.setattr("glq.kv.cache.kv_codec", lambda bits: Exact())


def prompts(*lengths: int) -> dict[str, torch.Tensor]:
    """Random tokens, padded on the left."""
    ids = torch.randint(2, 302, (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids.where(mask.bool(), 1), "attention_mask": mask}


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "chunked": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("name", ["model", "gemma"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("given", ["model", "config", None])
def test_generate_takes_it_as_it_takes_a_dynamic_cache(name, way, given, exact, request):
    model, inputs = request.getfixturevalue(name), prompts(5, 19, 12)
    about = {"model": {"model": model}, "config": {"config": model.config}, None: {}}[given]
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 1} | WAYS[way]
    outputs = []
    for cache in (DynamicCache(config=model.config), GlqCache(4, **about)):
        torch.manual_seed(0)
        outputs.append(model.generate(**inputs, **options, past_key_values=cache))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", ["model", "gemma"])
def test_assisted_decoding_crops(name, exact, request):
    model, inputs = request.getfixturevalue(name), prompts(19)
    plain = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=1)
    cache = GlqCache(4, model=model)
    assisted = model.generate(
        **inputs, max_new_tokens=24, do_sample=False, pad_token_id=1, prompt_lookup_num_tokens=3, past_key_values=cache
    )
    assert torch.equal(plain, assisted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("key_bits", "value_bits"), [(None, None), (4, 2), (3, None)])
@pytest.mark.parametrize("first", [30, 3])
def test_update_returns_the_decoded_states(dtype, key_bits, value_bits, first):
    """Keys less the mean of the first ones, if those were 16 at least and that makes them shorter."""
    cache = GlqCache(4, key_bits=key_bits, value_bits=value_bits)
    keys, values = torch.randn(2, 2, 3, 50, 64).to(dtype)
    chunks = [x.split([first, 50 - first], -2) for x in (keys, values)]
    parts = [cache.update(k, v, 0) for k, v in zip(*chunks, strict=True)]
    centre = keys[..., :first, :].float().mean(-2, keepdim=True).to(dtype).float() if first >= 16 else 0
    shorter = ((keys.float() - centre).square().sum(-1) <= keys.float().square().sum(-1))[..., None]
    assert first < 16 or 0 < shorter.sum() < shorter.numel()
    centres, bits_of_both = (centre * shorter, 0), (key_bits or 4, value_bits or 4)
    for x, y, shift, bits in zip((keys, values), parts[-1], centres, bits_of_both, strict=True):
        codec = kv_codec(bits)
        assert torch.equal(y, (codec.decode(*codec.encode(x.float() - shift)) + shift).to(dtype))
    assert cache.get_seq_length() == 50
    assert torch.equal(parts[-1][0][..., :first, :], parts[0][0])


def test_without_a_centre_keys_are_as_values():
    states = torch.randn(2, 3, 50, 64) + 10
    cache = GlqCache(4, centre=False)
    assert torch.equal(*cache.update(states, states, 0))
    assert cache.layers[0].centre is None


def test_what_all_keys_share_costs_nothing():
    shared, own = 10 * torch.randn(2, 3, 1, 64), torch.randn(2, 3, 100, 64)
    keys, values = GlqCache(4).update(shared + own, shared + own, 0)
    key_error, value_error = ((x - shared - own).square().mean() for x in (keys, values))
    assert key_error < 0.0075
    assert value_error > 0.5


def test_a_sequence_does_not_depend_on_its_batch():
    keys, values = torch.randn(2, 3, 2, 40, 64)
    whole = GlqCache(4).update(keys, values, 0)
    alone = GlqCache(4).update(keys[1:2], values[1:2], 0)
    for a, b in zip(whole, alone, strict=True):
        assert torch.allclose(a[1:2], b, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_memory(bits):
    cache, plain = GlqCache(bits), DynamicCache()
    for layer in range(2):
        states = torch.randn(2, 3, 2, 100, 128).bfloat16().unbind(1)[:2]
        cache.update(*states, layer)
        plain.update(*states, layer)
    full = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    kept = [x for y in cache.layers for x in (y.keys, y.values, y.centre.mean, y.centre.factors, y.centre.turned)]
    assert cache.nbytes == sum(x.untyped_storage().nbytes() for x in kept)
    one_key = 1 / 2 / 100  # in 16 bits, of 100 keys and values
    assert cache.nbytes / full == pytest.approx((bits + 16 / 128) / 16 + one_key, rel=3e-4)


def test_a_sliding_layer_keeps_its_window(gemma):
    cache = GlqCache(4, config=gemma.config)
    gemma.generate(**prompts(40), max_new_tokens=8, do_sample=False, past_key_values=cache)
    sliding, full = cache.layers
    assert sliding.keys.shape == (1, 1, 15, 32 // 2 + 2)
    assert full.keys.shape == (1, 1, 47, 32 // 2 + 2)


def test_reorder_repeat_select_crop_and_reset():
    cache = GlqCache(3)
    cache.update(*torch.randn(2, 3, 2, 10, 64), 0)
    rows = cache.layers[0].keys.clone()
    mean, turned = torch.arange(3.0)[:, None, None, None].expand(3, 2, 1, 64), torch.tensor([True, False, False])
    cache.layers[0].centre = Centre(mean, 2 * mean, turned[:, None, None, None], torch.ones(8))
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(cache.layers[0].keys, rows[[2, 0, 0]])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 5]))
    cache.crop(-4)
    assert torch.equal(cache.layers[0].keys, rows[[2, 0], :, :6])
    assert cache.layers[0].centre.mean[:, 0, 0, 0].tolist() == [2, 0]
    assert cache.layers[0].centre.factors[:, 0, 0, 0].tolist() == [4, 0]
    assert cache.layers[0].centre.turned.flatten().tolist() == [False, True]
    assert cache.get_seq_length() == 6
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0
    assert cache.layers[0].centre is None


def test_four_bits_change_little(model):
    inputs = prompts(200)
    with torch.no_grad():
        plain = model(**inputs).logits
        errors = [
            (model(**inputs, past_key_values=GlqCache(bits)).logits - plain).std() / plain.std() for bits in (4, 3, 2)
        ]
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < 0.05


def test_one_step_sees_what_one_pass_sees(model):
    """Token by token or all at once: the same codes, where the first keys set the same centre."""
    ids, cache = prompts(50)["input_ids"], GlqCache(4)
    with torch.no_grad():
        first = GlqCache(4)
        model(ids[:, :20], past_key_values=first)
        model(ids[:, :20], past_key_values=cache)
        whole = model(ids[:, 20:], past_key_values=first).logits[0]
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits[0, 0] for i in range(20, 50)]
    assert torch.allclose(torch.stack(steps), whole, atol=1e-2)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf, 1e38])
def test_nan_is_not_hidden_and_stays_where_it_is(bad):
    cache = GlqCache(4)
    states = torch.randn(2, 1, 1, 20, 64)
    states[:, 0, 0, 1, 5] = bad
    for decoded in cache.update(*states, 0):
        assert decoded[0, 0].isnan().sum(-1).tolist() == [0, 64, *[0] * 18]


def test_refused():
    with pytest.raises(GlqError, match="4, 3 or 2"):
        GlqCache(8)
    with pytest.raises(GlqError, match="without offloading"):
        GlqCache(4, config=LlamaConfig(num_hidden_layers=1)).offload(0, only_non_sliding=False)
    config = LlamaConfig(
        vocab_size=302, hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    with pytest.raises(GlqError, match="multiple of 8, found 12"):
        LlamaForCausalLM(config)(**prompts(5), past_key_values=GlqCache(4))


def test_command(tiny_checkpoint):
    from test_cli import run, runner

    from glq.cli import app

    output = run("generate", tiny_checkpoint, "w1 w2 w3", "--max-tokens", 5, "--device", "cpu", "--kv-bits", 4)
    assert output.startswith("w1 w2 w3")
    assert len(output.split()) == 8
    result = runner.invoke(app, ["generate", str(tiny_checkpoint), "w1", "--kv-bits", "5"])
    assert result.exit_code == 2
    assert "4, 3 or 2 bits, found 5" in result.stderr


def test_a_cache_goes_by_the_name_that_the_model_has_for_it():
    class Old:
        def forward(self, input_ids, past_key_values=None): ...

    class New:
        def forward(self, input_ids, cache=None, **kwargs): ...

    assert [cache_keyword(model()) for model in (Old, New)] == ["past_key_values", "cache"]
