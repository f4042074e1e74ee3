"""Factors of key channels in vLLM's pages: out of a checkpoint's files, layer by layer, and what they are worth."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from kv_reference import differences, logits_of
from safetensors.torch import load_file, save_file
from test_vllm import pytestmark as needs_vllm
from test_vllm import vllm  # noqa: F401
from test_vllm_kv import REPEATABLE, attention, config, gemma, shared_prompts  # noqa: F401
from transformers import DynamicCache

import glq
from glq import GlqCache
from glq.hf_integration import load
from glq.kv.channels import key_channels
from glq.vllm_integration.kv_factors import factors_in, factors_of


def edited(folder, copy, rename=lambda name: name, more=None):
    """A checkpoint with other names of its tensors, and with more of them."""
    shutil.copytree(folder, copy)
    tensors = {rename(name): tensor for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(tensors | (more or {}), copy / "model.safetensors")
    return copy


def assert_same(found, model):
    expected = key_channels(model)
    assert found.keys() == expected.keys() == {0, 1}
    for layer, factors in found.items():
        assert torch.equal(factors, expected[layer].factors)
        assert factors.min() < 0.3


def test_they_are_those_of_transformers(gemma):  # noqa: F811
    assert_same(factors_in(gemma), load(gemma, device="cpu"))


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_tensors_may_have_a_prefix(prefix, gemma, tmp_path):  # noqa: F811
    assert_same(factors_in(edited(gemma, tmp_path / "copy", lambda n: prefix + n)), load(gemma, device="cpu"))


def test_a_name_that_there_are_two_of_says_nothing(gemma, tmp_path):  # noqa: F811
    more = {"vision.layers.0.self_attn.k_norm.weight": torch.zeros(64)}
    assert factors_in(edited(gemma, tmp_path / "copy", more=more)).keys() == {1}


def test_norms_in_several_files(gemma, tmp_path):  # noqa: F811
    copy = edited(gemma, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    for i, part in enumerate(("q_norm", "k_norm", "")):
        some = {name: tensors.pop(name) for name in list(tensors) if part in name}
        save_file(some, copy / f"model-0000{i + 1}-of-00003.safetensors")
    (copy / "model.safetensors").unlink()
    assert_same(factors_in(copy), load(gemma, device="cpu"))


def test_a_checkpoint_of_glq(gemma, text_file, tmp_path):  # noqa: F811
    settings = glq.Settings(2, tokens=128, ctx=64, layers=(("*", "e8-2"),))
    glq.quantize(gemma, tmp_path / "out", settings, calibration=text_file, device="cpu")
    assert_same(factors_in(tmp_path / "out"), load(tmp_path / "out", device="cpu"))


def test_models_of_which_nothing_is_known(gemma, tmp_path):  # noqa: F811
    """Without norms, without files, and one that transformers does not know."""
    assert factors_in(make_model(tmp_path / "llama")) == {}
    assert factors_in(tmp_path) == {}
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(gemma / "config.json", bare)
    assert factors_in(bare) == {}
    unknown = edited(gemma, tmp_path / "unknown")
    given = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(given | {"model_type": "of_tomorrow"}))
    assert factors_in(unknown) == {}


def loaded(folder, load_format="auto"):
    """What of a VllmConfig is read."""
    settings = {"model": str(folder), "revision": None, "load_format": load_format, "download_dir": None}
    every = SimpleNamespace(**settings)
    every.model_config = every.load_config = every
    return every


def test_a_layers_are_found_by_its_name(gemma):  # noqa: F811
    known = factors_in(gemma)
    for name, layer in (("model.layers.1.self_attn.attn", 1), ("language_model.model.layers.0.self_attn.attn", 0)):
        assert torch.equal(factors_of(loaded(gemma), name), known[layer])
    for name in ("model.layers.2.self_attn.attn", "model.layers.1.attn.0", "", "attn"):
        assert factors_of(loaded(gemma), name) is None
    assert factors_of(loaded(gemma, "dummy"), "model.layers.1.self_attn.attn") is None
    for elsewhere in ("nobody/has-this-model", "no name: of any model"):
        assert factors_of(loaded(elsewhere), "model.layers.1.self_attn.attn") is None


@needs_vllm
@pytest.mark.parametrize(("own", "target", "head_size"), [(0, None, 64), (1, 0, 64), (1, 1, 64), (0, None, 32)])
def test_a_layer_reads_with_the_factors_that_its_pages_were_written_with(own, target, head_size, gemma, attention):  # noqa: F811
    """`target`: another one, whose pages it shares. Factors of other heads than its own are none of its."""
    name = "model.layers.{}.self_attn.attn".format
    shared = {} if target is None else {"kv_sharing_target_layer_name": name(target)}
    layer, of_model = attention({"glq_kv_bits": 4}, head_size=head_size, **shared), loaded(gemma)
    assert layer.factors is None
    layer.config = config({"glq_kv_bits": 4}, **vars(of_model))
    layer.config.load_config = layer.config.model_config = of_model
    layer.config.device_config = SimpleNamespace(device_type="cpu")
    others = {"experts": object(), name(1 - own): SimpleNamespace(impl=object())}
    module = torch.nn.Module()
    module.impl = layer
    layer.config.compilation_config.static_forward_context = others | {name(own): module}
    layer.process_weights_after_loading(torch.float32)
    if head_size != 64:
        assert layer.factors is None
        return
    factors = layer.factors
    assert torch.equal(factors, factors_in(gemma)[own if target is None else target])
    assert dict(module.named_buffers()) == {"glq_key_factors": factors}
    assert module.state_dict() == {}
    layer.process_weights_after_loading(torch.float32)  # other weights: pages keep what they have
    assert layer.factors is factors


@needs_vllm
def test_chunks_and_shared_pages_with_factors(gemma, vllm):  # noqa: F811
    """As transformers has it, and nearer to 16 bits than codes without factors are."""
    prompts = shared_prompts(40, 50, 60, 70)
    options = REPEATABLE | {"max_num_batched_tokens": 32, "block_size": 16, "max_model_len": 112}
    answer = vllm(gemma, prompts, 24, disable_log_stats=False, writes=True, **options)
    model = load(gemma, device="cpu")
    apart, behind = differences(answer, model, prompts, lambda: GlqCache(4, model=model, centre=False))
    assert apart.max() < 1e-4
    assert behind.max() < 1e-4
    assert answer["metrics"]["vllm:prefix_cache_hits"] > 0
    lost = []
    for prompt, tokens in zip(prompts, answer["tokens"], strict=True):
        plain = GlqCache(4, config=model.config, centre=False)
        a, b = (logits_of(model, prompt, tokens, c).log_softmax(-1) for c in (plain, DynamicCache(config=model.config)))
        lost.append((a - b)[torch.arange(len(tokens)), tokens].abs())
    assert differences(answer, model, prompts, DynamicCache)[0].mean() < torch.cat(lost).mean() / 2
