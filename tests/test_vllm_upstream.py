"""Checkpoints of upstream glq in real vLLM on the CPU: the tokens and log-probs of the weights that the codes mean."""

from importlib.util import find_spec

import pytest
from test_vllm import assert_same, vllm  # noqa: F401
from upstream_writer import Writer, llama, with_weights, write_model, write_moe

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm")

PROMPTS = [[3, 5, 9], [7, 8]]
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}  # on vLLM's CPU a head is 32 at least


@pytest.mark.parametrize("codec", ["e8_shell", "e8p", "3inst"])
def test_packed(vllm, codec, tmp_path):  # noqa: F811
    model = llama(attention_bias=True, **HEADS)
    path, expected = write_model(tmp_path / "m", model, Writer(codec, 5))
    answer = vllm(path, PROMPTS, packed=True, count=True, skip_tokenizer_init=True)
    assert_same(answer, with_weights(model, expected), PROMPTS, 1e-5)
    assert answer["calls"]["upstream_matmul"] > 0


@pytest.mark.slow
def test_packed_and_compiled(vllm, tmp_path):  # noqa: F811
    model = llama(**HEADS)
    path, expected = write_model(tmp_path / "m", model, Writer("e8p", 3))
    answer = vllm(path, PROMPTS, packed=True, count=True, skip_tokenizer_init=True, enforce_eager=False)
    assert_same(answer, with_weights(model, expected), PROMPTS, 1e-5)
    assert answer["calls"]["upstream_matmul"] > 0


@pytest.mark.slow
def test_ranks_get_shares_of_decoded_weights(vllm, tmp_path):  # noqa: F811
    model = llama(**HEADS)
    path, expected = write_model(tmp_path / "m", model, Writer("3inst", 4))
    answer = vllm(path, PROMPTS, skip_tokenizer_init=True, tensor_parallel_size=2)
    assert_same(answer, with_weights(model, expected), PROMPTS, 1e-5)


@pytest.mark.parametrize("joint", [False, True])
def test_experts(vllm, joint, tmp_path):  # noqa: F811
    path, plain = write_moe(tmp_path / "m", Writer("e8p", 4), joint)
    assert_same(vllm(path, PROMPTS, skip_tokenizer_init=True), plain, PROMPTS, 1e-4)


def test_what_is_damaged_is_refused(vllm, tmp_path):  # noqa: F811
    from safetensors.torch import load_file, save_file

    path, _ = write_model(tmp_path / "m", llama(**HEADS), Writer("e8p", 4))
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.SU"]
    save_file(tensors, path / "model.safetensors")
    assert "q_proj has Qidxs_e8p, but no SU" in vllm(path, skip_tokenizer_init=True)
