"""The keys' centre from before the rotary embedding, and the factors of their channels."""

import pytest
import torch
from torch import Tensor
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PhiConfig, Qwen3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForCausalLM, Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding
from transformers.models.qwen3 import Qwen3ForCausalLM

from glq import GlqCache
from glq.kv.centre import Centre, rotary_pairs
from glq.kv.channels import key_channels

SMALL = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA = LlamaConfig(**SMALL, num_attention_heads=2, num_key_value_heads=1, head_dim=64)


def gemma_config(**options) -> Gemma3TextConfig:
    kinds = ["sliding_attention", "full_attention"]
    return Gemma3TextConfig(
        **SMALL, num_attention_heads=2, num_key_value_heads=1, head_dim=64, layer_types=kinds, **options
    )


def turned(config: LlamaConfig, x: Tensor, first: int = 0) -> Tensor:
    """x [batch, heads, tokens, head_dim] as transformers turns it, the first token at a position of its own."""
    positions = torch.arange(first, first + x.shape[-2])[None]
    return apply_rotary_pos_emb(x, x, *LlamaRotaryEmbedding(config)(x, positions))[0]


def error(seen: Tensor, x: Tensor) -> float:
    return (seen - x).square().mean().item()


SCALED = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "llama": (LLAMA, LlamaRotaryEmbedding),
    "llama3": (
        LlamaConfig(**SMALL, num_attention_heads=2, rope_parameters=SCALED | {"original_max_position_embeddings": 512}),
        LlamaRotaryEmbedding,
    ),
    "half of the channels": (PhiConfig(**SMALL, num_attention_heads=2), PhiRotaryEmbedding),
}


@pytest.mark.parametrize("name", ROPES)
def test_the_angles_are_the_models(name):
    config, rotary = ROPES[name]
    positions = torch.arange(1000)
    cos, _ = rotary(config)(torch.empty(1), positions[None])
    angles = positions[:, None] * rotary_pairs(config, 0)
    assert torch.allclose(angles.cos().repeat(1, 2), cos[0], atol=1e-6)


def test_each_kind_of_layer_has_its_angles():
    config = gemma_config(sliding_window=16)
    positions = torch.arange(1000)
    for layer, kind in enumerate(config.layer_types):
        cos, _ = Gemma3RotaryEmbedding(config)(torch.empty(1), positions[None], kind)
        angles = positions[:, None] * rotary_pairs(config, layer)
        assert torch.allclose(angles.cos().repeat(1, 2), cos[0], atol=1e-6)
    assert not torch.equal(rotary_pairs(config, 0), rotary_pairs(config, 1))


def test_a_config_that_tells_nothing():
    config = LlamaConfig(**SMALL, num_attention_heads=2)
    config.rope_parameters = None
    assert rotary_pairs(config, 0).numel() == 0


@pytest.mark.parametrize("first", [0, 300])
def test_what_keys_share_before_they_are_turned_costs_nothing(first):
    """Long after the tokens that the mean is of, and wherever positions begin, as behind padding they do."""
    keys = turned(LLAMA, 10 * torch.randn(2, 1, 1, 64) + torch.randn(2, 1, 200, 64), first)
    errors = []
    for about in ({"config": LLAMA}, {}):
        cache = GlqCache(4, **about)
        for part in keys.split([20, 1, 179], -2):
            seen, _ = cache.update(part, part, 0)
        errors.append(error(seen, keys))
    assert errors[0] < 0.01
    assert errors[1] > 0.2


def test_behind_a_window_and_after_a_crop():
    config = gemma_config(sliding_window=16)
    wave = LlamaConfig(
        **SMALL, num_attention_heads=2, head_dim=64, rope_parameters=config.rope_parameters.get("sliding_attention")
    )
    keys = turned(wave, 10 * torch.randn(2, 1, 1, 64) + torch.randn(2, 1, 100, 64))
    cache = GlqCache(4, config=config)
    cache.layers[0].activate_past_recording()
    parts = keys.split([40, 8, 52], -2)
    for part in parts[:2]:
        cache.update(part, part, 0)
    cache.layers[0].crop(-8)
    for part in parts[1:]:
        seen, _ = cache.update(part, part, 0)
    assert error(seen, keys[..., -seen.shape[-2] :, :]) < 0.01


def test_keys_that_are_not_turned_have_a_plain_mean():
    """Each sequence for itself."""
    shared = 10 * torch.randn(1, 1, 1, 64).expand(1, 1, 100, 64)
    keys = torch.cat([shared, turned(LLAMA, shared)])
    centre = Centre.of(keys, rotary_pairs(LLAMA, 0), None, torch.float32)
    assert centre.turned.flatten().tolist() == [False, True]
    left, alone = centre.subtract(keys, 0)
    assert left.abs().max() < 1e-3
    assert not alone.any()


def test_a_key_unlike_the_others_is_rounded_by_itself():
    """As the first of a text often is: short, where the centre is long."""
    keys = turned(LLAMA, 10 * torch.randn(1, 1, 1, 64) + torch.randn(1, 1, 100, 64))
    keys[..., [0, 70], :] = torch.randn(1, 1, 2, 64)
    seen, _ = GlqCache(4, config=LLAMA).update(keys, keys, 0)
    assert (seen - keys).square().mean(-1).max() < 0.03


def test_more_pairs_than_channels_are_none():
    keys = torch.randn(1, 1, 20, 24)
    centre = Centre.of(keys, rotary_pairs(LLAMA, 0), None, torch.float32)
    assert torch.equal(centre.mean, keys.mean(-2, keepdim=True))
    left, alone = centre.subtract(keys, 7)
    assert torch.equal(left, torch.where(alone[..., None], keys, keys - centre.mean))


@pytest.mark.parametrize("first", [16, 1000])
def test_what_is_left_tells_more_of_channels_than_norms(first):
    """And the more keys there are the more it tells; with a right guess nothing changes."""
    keys = torch.randn(1, 2, first, 64)
    size = torch.rand(2, 1, 32).add(0.5).repeat(1, 1, 2)
    guess = torch.ones(64)
    centre = Centre.of(keys * size, rotary_pairs(LLAMA, 0), guess, torch.float32)
    exact = size**-0.5
    ratio = centre.factors / exact
    assert ratio.std() / ratio.mean() < (0.1 if first == 1000 else 0.25)
    found = Centre.of(keys, rotary_pairs(LLAMA, 0), guess, torch.float32).factors
    assert (found - 1).abs().max() < 0.15
    x = torch.randn(1, 2, 5, 64)
    assert torch.allclose(centre.add(*centre.subtract(x, 3), 3), x, atol=1e-5)


def normed(kind: str) -> Gemma3ForCausalLM | Qwen3ForCausalLM:
    """Channel 5 of keys is 20 times the others, and hardly asked for. Gemma's norms have gains of 1 + weight."""
    config = gemma_config() if kind == "gemma" else Qwen3Config(**SMALL, num_attention_heads=2, head_dim=64)
    model = (Gemma3ForCausalLM if kind == "gemma" else Qwen3ForCausalLM)(config)
    for layer in model.model.layers:
        for norm, gain in ((layer.self_attn.q_norm, 0.1), (layer.self_attn.k_norm, 20.0)):
            gains = torch.ones(64)
            gains[5] = gain
            norm.weight.data = gains - float(kind == "gemma")
    return model


@pytest.mark.parametrize("kind", ["gemma", "qwen"])
def test_factors_are_those_of_the_norms(kind):
    factors = key_channels(normed(kind))
    assert sorted(factors) == [0, 1]
    expected = torch.ones(64)
    expected[[5, 37]] = ((0.01 + 1) / (400 + 1)) ** 0.25  # channels 5 and 37 are a pair
    assert torch.allclose(factors[0].factors, expected)


def test_a_channel_that_a_norm_makes_0():
    model = normed("qwen")
    model.model.layers[0].self_attn.q_norm.weight.data[:] = 0
    model.model.layers[1].self_attn.q_norm.weight.data[[3, 35]] = 0
    factors = key_channels(model)
    assert sorted(factors) == [1]
    assert 0 < factors[1].factors[3] < 0.5


def test_models_without_norms_have_no_factors():
    assert key_channels(LlamaForCausalLM(LLAMA)) == {}


def test_factors_make_products_more_exact():
    model = normed("gemma")
    keys, queries = torch.randn(2, 2, 1, 100, 64)
    keys[..., [5, 37]] *= 20
    queries[..., [5, 37]] *= 0.1
    errors = []
    for about in ({"model": model}, {"config": model.config}):
        cache = GlqCache(4, centre=False, **about)
        seen, values = cache.update(keys, keys, 1)
        errors.append(error(queries @ seen.mT, queries @ keys.mT))
        assert error(seen, keys) < error(0, keys) / 50
    assert torch.equal(values, seen)
    assert errors[0] < errors[1] / 5
