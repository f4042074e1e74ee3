"""Graphs: which calls they take; on a GPU, that `generate` writes the same with them."""

import pytest
import torch
from conftest import make_model
from transformers import AutoModelForCausalLM, StaticCache

import glq
import glq.hf_integration
from glq.graphs import GraphedForward, _is_step, decode_in_graphs

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


@needs_gpu
@pytest.mark.parametrize("batch", [1, 3])
def test_generate_writes_the_same_in_graphs(tmp_path, text_file, batch):
    model = make_model(tmp_path / "model", hidden_size=256, intermediate_size=512)
    glq.quantize(model, tmp_path / "out", glq.Settings(bits=4, tokens=512, ctx=64), calibration=text_file)
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16).cuda().eval()
    decode_in_graphs(quantized)
    ids = torch.randint(2, 300, (batch, 7), device="cuda")
    settings = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": "static"}
    plain = quantized.generate(ids, disable_compile=True, **settings)
    for _ in range(2):
        assert torch.equal(quantized.generate(ids, **settings), plain)
    other = torch.randint(2, 300, (batch, 11), device="cuda")
    assert torch.equal(
        quantized.generate(other, **settings), quantized.generate(other, disable_compile=True, **settings)
    )
