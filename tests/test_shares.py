"""What `glq info --tp` counts is what the layers of each rank would hold."""

import json

import pytest
from conftest import make_model
from transformers import LlamaConfig
from typer.testing import CliRunner

import glq
from glq import GlqError
from glq.checkpoint import read_config
from glq.cli import app
from glq.config import ModuleConfig
from glq.vllm_integration.parts import Rank, cut
from glq.vllm_integration.shares import checkpoint_shares, shares


def layers(modules, config, rank):
    """(modules, rows of each output, columns) of the layers that vLLM makes of a Llama."""
    n, size = rank.size, config.head_dim
    q, kv = config.num_attention_heads // n * size, max(1, config.num_key_value_heads // n) * size
    for i in range(config.num_hidden_layers):
        a, m, hidden = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp", config.hidden_size
        inside = config.intermediate_size // n
        for names, rows, columns in (
            ([f"{a}.{key}_proj" for key in "qkv"], [q, kv, kv], hidden),
            ([f"{a}.o_proj"], [hidden], q),
            ([f"{m}.gate_proj", f"{m}.up_proj"], [inside, inside], hidden),
            ([f"{m}.down_proj"], [hidden], inside),
        ):
            yield {name: modules[name] for name in names}, rows, columns


def expected(path, config, rank):
    """Packed bytes, as methods.py makes tensors of the parts."""
    total = 0
    for modules, rows, columns in layers(read_config(path).modules, config, rank):
        parts = cut(modules, rows, columns, rank)
        total += sum(part.nbytes + 2 * part.rows for part in parts) + len(parts) * -(-columns // 8)
    return total


@pytest.fixture(scope="module")
def for_two(text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 384}
    model = make_model(folder / "model", attention_bias=True, **sizes)
    settings = glq.Settings(3, "nested-3", tokens=512, ctx=64, tensor_parallel=2)
    glq.quantize(model, folder / "out", settings, calibration=text_file, device="cpu")
    return folder / "out"


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_rank_holds_what_its_layers_do(for_two, ranks):
    config = LlamaConfig.from_pretrained(for_two)
    found = checkpoint_shares(for_two, ranks)
    assert [share.packed for share in found] == [expected(for_two, config, Rank(i, ranks)) for i in range(ranks)]
    vocabulary, norms, biases = 2 * 384 * 256, 5 * 256, 2 * (256 + 128 + 128)
    assert {share.other for share in found} == {2 * (vocabulary + biases) // ranks + 2 * (norms + 2 * 256)}
    summary = glq.inspect(for_two)
    if ranks == 1:
        assert found[0].packed == summary.quantized_bytes
        assert found[0].other == summary.other_bytes


def test_a_quantized_vocabulary_is_cut(tiny_even):
    one, two = (checkpoint_shares(tiny_even, ranks) for ranks in (1, 2))
    assert one[0].packed == glq.inspect(tiny_even).quantized_bytes
    assert 0.5 < two[0].packed / one[0].packed < 0.52
    assert two[0] == two[1]


def test_info_says_it(for_two):
    output = CliRunner().invoke(app, ["info", str(for_two), "--tp", "2"]).output
    first, _ = checkpoint_shares(for_two, 2)
    line = f"rank 1 of 2: {first.packed:,} bytes quantized + {first.other:,} other = {first.total:,}"
    assert line in output
    output = CliRunner().invoke(app, ["info", str(for_two), "--tp", "2", "--json"]).output
    assert json.loads(output)["ranks"] == 2 * [{"packed": first.packed, "other": first.other}]


def test_what_vllm_would_refuse_is_refused_alike(tiny_checkpoint, for_two):
    with pytest.raises(GlqError) as ours:
        checkpoint_shares(tiny_checkpoint, 2)
    modules = read_config(tiny_checkpoint).modules
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(GlqError) as theirs:
        cut({name: modules[name]}, [48], 96, Rank(0, 2))
    assert str(ours.value) == str(theirs.value)
    with pytest.raises(GlqError, match="4 attention heads with 2 of keys and values cannot be cut to 3 ranks"):
        checkpoint_shares(for_two, 3)
    with pytest.raises(GlqError, match="at least 1"):
        checkpoint_shares(for_two, 0)


def test_heads_of_keys_are_not_cut_and_experts_share_signs():
    config = LlamaConfig(hidden_size=512, num_attention_heads=8, num_key_value_heads=2, vocab_size=512)
    modules = {"model.layers.0.self_attn.k_proj": ModuleConfig("trellis-2", 512, 128, 512)}
    assert len({share.packed for share in shares(modules, config, {}, 4)}) == 1
    head = shares(modules, config, {}, 2)
    assert shares(modules, config, {}, 4)[0] == head[0]
    expert = {"model.layers.0.mlp.experts.*.down_proj": ModuleConfig("trellis-2", 256, 512, 128, experts=6)}
    (half, _), (whole,) = shares(expert, config, {}, 2), shares(expert, config, {}, 1)
    assert whole.packed == 6 * (512 * 256 // 4 + 1024) + 32
    assert half.packed == 6 * (512 * 128 // 4 + 1024) + 16
