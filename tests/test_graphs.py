"""Graphs: which calls they take; on a GPU, that `generate` writes the same with them."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from conftest import make_model
from emulator import Emulator
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, StaticCache
from transformers.masking_utils import create_masks_for_generate

import glq
import glq.hf_integration
from glq import nvrtc
from glq.graphs import GraphedForward, _addresses, _is_step, _mask_for_step, decode_in_graphs

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_on_a_cpu_calls_go_through(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    cache = StaticCache(config=model.config, max_cache_len=16)
    graphed = GraphedForward(model.__call__)
    ids = torch.tensor([[5, 6, 7]])
    first = graphed(input_ids=ids, past_key_values=cache)
    assert torch.equal(first.logits, model(input_ids=ids).logits)
    step = {"input_ids": torch.tensor([[8]])}
    assert not _is_step(cache, step)
    graphed(**step, past_key_values=cache)
    assert cache.get_seq_length() == 4


def test_a_graph_belongs_to_every_tensor_of_a_cache(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)
    before = _addresses(cache)
    assert len(before) == 3 * model.config.num_hidden_layers
    for name in ("keys", "values", "cumulative_length"):
        setattr(cache.layers[1], name, getattr(cache.layers[1], name).clone())
        assert _addresses(cache) != before
        before = _addresses(cache)


def test_a_loaded_model_has_graphs_of_its_own(tiny_checkpoint, monkeypatch):
    """Copies decode with their own weights, and a deleted model is gone."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    asked = []
    monkeypatch.setattr(type(model), "get_compiled_call", lambda self, config: asked.append((self, config)))
    again = pickle.loads(pickle.dumps(model))
    other = copy.deepcopy(model)
    for each in (model, again, other):
        each.get_compiled_call(CompileConfig())
        assert asked.pop() == (each, CompileConfig())
        each.get_compiled_call(None)  # on a CPU
        assert asked.pop() == (each, None)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    graphed = model.get_compiled_call(None)
    assert isinstance(graphed, GraphedForward)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(graphed(input_ids=ids).logits, model(ids).logits)
    other.lm_head.weight.data.zero_()
    assert other.get_compiled_call(None)(input_ids=ids).logits.abs().max() == 0
    model.hf_device_map = {"model": 0, "lm_head": 1}
    assert model.get_compiled_call(None) is None
    assert asked.pop() == (model, None)
    del model.hf_device_map
    decode_in_graphs(model, fused=False)
    assert not pickle.loads(pickle.dumps(model)).get_compiled_call(None)._fused
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model, each, graphed
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("padded", [0, 2])
def test_a_step_makes_its_mask_itself(tiny_model, padded):
    """Of the mask of tokens, as long as the cache; anything but a step in a static cache has what it had."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    tokens = torch.ones_like(ids)
    tokens[0, :padded] = 0
    logits = []
    for make in (create_masks_for_generate, _mask_for_step):
        cache = StaticCache(config=model.config, max_cache_len=9)
        model(input_ids=ids[:, :3], attention_mask=tokens[:, :3], past_key_values=cache)
        mask = make(model.config, torch.empty(2, 1, 0), tokens, cache)
        where = {"position_ids": tokens.sum(1, keepdim=True) - 1, "past_key_values": cache}
        logits.append(model(input_ids=ids[:, 3:], attention_mask=mask, **where).logits)
    assert mask.shape == (2, 9)
    assert torch.equal(*logits)
    for size, other in ((3, cache), (1, DynamicCache())):
        given = (model.config, torch.empty(2, size, 0), tokens, other)
        made, expected = _mask_for_step(*given), create_masks_for_generate(*given)
        assert made is expected is None or torch.equal(made, expected)


class Replayed:
    """A graph on a CPU: the step, done again."""

    def __init__(self, forward, step):
        self._forward, self._step = forward, step

    def replay(self):
        self._forward._output = self._step()


def logits_of_steps(model, forward, batch=1, steps=6, length=24):
    """Of the same tokens, whatever the model would write."""
    ids = torch.randint(2, 300, (batch, steps + 3), generator=torch.Generator().manual_seed(2)).to(model.device)
    cache = StaticCache(config=model.config, max_cache_len=length)
    with torch.no_grad():
        model(input_ids=ids[:, :3], past_key_values=cache)
    found = []
    for at in range(3, 3 + steps):
        mask = (torch.arange(length, device=ids.device) <= at).expand(batch, 1, 1, -1).contiguous()
        where = {"attention_mask": mask, "position_ids": torch.full_like(ids[:, :1], at)}
        found.append(forward(input_ids=ids[:, at : at + 1], past_key_values=cache, **where).logits.float().clone())
    return torch.stack(found)


@pytest.mark.parametrize("seen", [True, False])
def test_steps_are_recorded_proved_and_replayed(tiny_model, monkeypatch, seen):
    """Or, if PyTorch does not see all of it, replayed as they are."""
    pytest.importorskip("cuda.core")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16 if seen else torch.float32)
    monkeypatch.setattr("glq.graphs._is_step", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(nvrtc, "gpu", lambda _: Emulator(2))
    monkeypatch.setattr(GraphedForward, "_capture", lambda self, step: Replayed(self, step))
    calls = []

    def forward(**inputs):
        calls.append(inputs)
        output = model(**inputs)
        if not seen:
            output.logits.numpy()[:] += 1
        return output

    expected = logits_of_steps(model, lambda **inputs: model(**inputs)) + (not seen)
    if seen:
        found = logits_of_steps(model, GraphedForward(forward))
    else:
        with pytest.warns(UserWarning, match="keeps its kernels: done again, it is not the same"):
            found = logits_of_steps(model, GraphedForward(forward))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert len(calls) == (2 if seen else 7)  # one more to see how far the model is from itself
    calls.clear()
    assert torch.equal(logits_of_steps(model, GraphedForward(forward, fused=False)), expected)
    assert len(calls) == 6


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}])
def test_generate_on_a_cpu(tiny_checkpoint, settings):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    dense = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).dequantize(torch.float32)
    written = model.generate(ids, max_new_tokens=8, do_sample=False, **settings)
    assert torch.equal(written, dense.generate(ids, max_new_tokens=8, do_sample=False))


def quantized_on_a_gpu(path, text_file, dtype):
    model = make_model(path / "model", hidden_size=256, intermediate_size=512)
    glq.quantize(model, path / "out", glq.Settings(bits=4, tokens=512, ctx=64), calibration=text_file)
    return AutoModelForCausalLM.from_pretrained(path / "out", dtype=dtype).cuda().eval()


@needs_gpu
@pytest.mark.parametrize("batch", [1, 3])
def test_generate_writes_the_same_in_graphs(tmp_path, text_file, batch):
    quantized = quantized_on_a_gpu(tmp_path, text_file, torch.float16)
    decode_in_graphs(quantized, fused=False)  # which rounds as PyTorch does: no tie is decided in another way
    ids = torch.randint(2, 300, (batch, 7), device="cuda")
    settings = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": "static"}
    plain = quantized.generate(ids, disable_compile=True, **settings)
    for _ in range(2):
        assert torch.equal(quantized.generate(ids, **settings), plain)
    other = torch.randint(2, 300, (batch, 11), device="cuda")
    assert torch.equal(
        quantized.generate(other, **settings), quantized.generate(other, disable_compile=True, **settings)
    )


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_fused_steps_differ_by_rounding(tmp_path, text_file, batch, dtype):
    """With no warning: every kernel is right, and what was recorded is what the model does."""
    quantized = quantized_on_a_gpu(tmp_path, text_file, dtype)
    plain, again = (
        logits_of_steps(quantized, GraphedForward(quantized.__call__, fused=False), batch, 12) for _ in "12"
    )
    assert torch.equal(plain, again)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a kernel for|the decoding step")
        fused = logits_of_steps(quantized, GraphedForward(quantized.__call__), batch, 12)
    assert (fused - plain).norm() < 8 * torch.finfo(dtype).eps * plain.norm()
    assert not torch.equal(fused, plain)
