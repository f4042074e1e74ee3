"""Graphs: which calls they take; on a GPU, that `generate` writes the same with them."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from conftest import make_model
from transformers import AutoModelForCausalLM, CompileConfig, StaticCache

import glq
import glq.hf_integration
from glq.graphs import GraphedForward, _addresses, _is_step

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
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model, each, graphed
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}])
def test_generate_on_a_cpu(tiny_checkpoint, settings):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    dense = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).dequantize(torch.float32)
    written = model.generate(ids, max_new_tokens=8, do_sample=False, **settings)
    assert torch.equal(written, dense.generate(ids, max_new_tokens=8, do_sample=False))


@needs_gpu
@pytest.mark.parametrize("batch", [1, 3])
def test_generate_writes_the_same_in_graphs(tmp_path, text_file, batch):
    model = make_model(tmp_path / "model", hidden_size=256, intermediate_size=512)
    glq.quantize(model, tmp_path / "out", glq.Settings(bits=4, tokens=512, ctx=64), calibration=text_file)
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16).cuda().eval()
    ids = torch.randint(2, 300, (batch, 7), device="cuda")
    settings = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": "static"}
    plain = quantized.generate(ids, disable_compile=True, **settings)
    for _ in range(2):
        assert torch.equal(quantized.generate(ids, **settings), plain)
    other = torch.randint(2, 300, (batch, 11), device="cuda")
    assert torch.equal(
        quantized.generate(other, **settings), quantized.generate(other, disable_compile=True, **settings)
    )
