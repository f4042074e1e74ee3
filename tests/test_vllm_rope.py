"""The pass that joins a rotary embedding and the write to the KV cache, in small graphs; vLLM's config for it."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from emulator import Emulator
from test_vllm import pytestmark  # noqa: F401
from torch.fx.experimental.proxy_tensor import make_fx

HEADS, KV_HEADS, HEAD = 4, 2, 32
SIZES = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
TOKENS = 5


class Impl:
    """An attention's that keeps what it is given for its cache."""

    def __init__(self):
        self.given = []

    def do_kv_cache_update(self, layer, key, value, kv_cache, slots):
        assert layer.impl is self
        self.given.append((key.clone(), value.clone(), kv_cache, slots))


@pytest.fixture
def impl(monkeypatch):
    """Of the layer whose context both ops ask for."""
    from vllm.model_executor.layers.attention import attention

    from glq.vllm_integration import rope

    layer = SimpleNamespace(impl=Impl())

    def context(name):
        assert name == "layers.0"
        return None, layer, torch.zeros(1), torch.arange(TOKENS)

    for module in (attention, rope):
        monkeypatch.setattr(module, "get_attention_context", context)
    return layer.impl


def turn(q, k, positions, angles):
    from torch._higher_order_ops.auto_functionalize import auto_functionalized

    facts = {"head_size": HEAD, "is_neox": True, "rope_dim_offset": 0, "inverse": False}
    op = torch.ops._C.rotary_embedding.default
    _, q, k = auto_functionalized(op, positions=positions, query=q, key=k, cos_sin_cache=angles, **facts)
    return q, k


@torch.library.custom_op("glq_tests::write", mutates_args=())
def written(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Stands for vLLM's op while a graph is traced: make_fx does not take the name of a layer."""
    return key.new_empty(0)


@written.register_fake
def _(key, value):
    return key.new_empty(0)


def write(k, v):
    return written(*(x.view(-1, KV_HEADS, HEAD) for x in (k, v)))


def in_place(qkv, positions, angles):
    """As functionalization writes what turns columns of qkv in place."""
    q, k, _ = qkv.split_with_sizes(SIZES, -1)
    q, k = turn(q, k, positions, angles)
    qkv = torch.slice_scatter(qkv, q, 1, 0, SIZES[0])
    qkv = torch.slice_scatter(qkv, k, 1, SIZES[0], SIZES[0] + SIZES[1])
    q, k, v = qkv.split_with_sizes(SIZES, -1)
    return q, k, v, write(k, v)


def from_parts(qkv, positions, angles):
    """As where queries and keys are tensors of their own: they are normed, say."""
    q, k, v = qkv.split_with_sizes(SIZES, -1)
    q, k = turn(q * 2, k * 3, positions, angles)
    return q, k, v, write(k, v)


class Case:
    """A graph as Inductor has it, and after the pass; both say and write the same."""

    def __init__(self, function, impl):
        from vllm.utils.torch_utils import _encode_layer_name

        from glq.vllm_integration.passes import FuseIntoProducts

        phase = torch.randn(50, HEAD // 2)
        inputs = (
            torch.randn(TOKENS, sum(SIZES)),
            torch.randint(50, (TOKENS,)),
            torch.cat((phase.cos(), phase.sin()), 1),
        )
        self.graph = make_fx(function, tracing_mode="symbolic")(*inputs)
        inputs = (*inputs, self.name_layer(_encode_layer_name("layers.0")))
        impl.given.clear()
        expected = self.graph(*inputs)
        FuseIntoProducts()(self.graph.graph)
        self.graph.graph.lint()
        self.graph.recompile()
        self.ops = [str(node.target) for node in self.graph.graph.nodes if node.op == "call_function"]
        for result, wanted in zip(self.graph(*inputs), expected, strict=True):
            torch.testing.assert_close(result, wanted)
        before, after = impl.given
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(one, other)

    def name_layer(self, name):
        """The layer's name, which becomes the graph's last input, of vLLM's op in the place of its stand-in."""
        graph = self.graph.graph
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        with graph.inserting_after(last):
            layer = graph.placeholder("layer")
        layer.meta["val"] = name
        for node in graph.find_nodes(op="call_function", target=torch.ops.glq_tests.write.default):
            node.target, node.args = torch.ops.vllm.unified_kv_cache_update.default, (*node.args, layer)
        graph.eliminate_dead_code()
        self.graph.recompile()
        return name


@pytest.mark.parametrize("function", [in_place, from_parts])
def test_both_become_one_op(function, impl):
    done = Case(function, impl)
    assert done.ops.count("glq.rope_and_cache.default") == 1
    assert not {"auto_functionalized", "vllm.unified_kv_cache_update.default"} & set(done.ops)
    assert "aten.slice_scatter.default" not in done.ops


def left():
    """Functions in which the pass finds nothing that it may join."""

    def not_turned(qkv, positions, angles):
        _, k, v = qkv.split_with_sizes(SIZES, -1)
        return (write(k + 1, v),)

    def turned_values(qkv, positions, angles):
        q, k, v = qkv.split_with_sizes(SIZES, -1)
        q, _ = turn(q, k, positions, angles)
        return q, write(q[:, : SIZES[1]], v)

    return {"keys that do not turn": not_turned, "queries": turned_values}


@pytest.mark.parametrize("name", ["keys that do not turn", "queries"])
def test_what_does_not_fit_is_left(name, impl):
    done = Case(left()[name], impl)
    assert "glq.rope_and_cache.default" not in done.ops
    assert done.ops.count("vllm.unified_kv_cache_update.default") == 1


def test_columns_of_several_origins_are_left(impl):
    """Keys cut 16 columns ahead of those that turned."""

    def cut(qkv, positions, angles):
        q, k, _ = qkv.split_with_sizes(SIZES, -1)
        q, k = turn(q, k, positions, angles)
        qkv = torch.slice_scatter(qkv, k, 1, SIZES[0], SIZES[0] + SIZES[1])
        _, k, v = qkv.split_with_sizes([SIZES[0] - 16, SIZES[1], SIZES[2] + 16], -1)
        return q, k, write(k, v[:, 16:])

    done = Case(cut, impl)
    assert "glq.rope_and_cache.default" not in done.ops
    assert "aten.slice_scatter.default" in done.ops


def config(**changes):
    from vllm.config import CompilationConfig, CompilationMode

    facts = {"use_mla": False, "uses_mrope": False, "use_ubatching": False, "splits": True, "ops": ["none"]} | changes
    splits = ["vllm::unified_attention_with_output", *(["vllm::unified_kv_cache_update"] * facts["splits"])]
    compilation = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, splitting_ops=splits, custom_ops=facts["ops"])
    return SimpleNamespace(
        compilation_config=compilation,
        model_config=SimpleNamespace(use_mla=facts["use_mla"], uses_mrope=facts["uses_mrope"]),
        parallel_config=SimpleNamespace(use_ubatching=facts["use_ubatching"]),
    )


def test_the_config_is_changed_where_it_helps_and_nowhere_else(monkeypatch):
    from glq.vllm_integration import rope

    ours = config()
    assert rope.prepare_config(ours)
    assert ours.compilation_config.splitting_ops == ["vllm::unified_attention_with_output"]
    assert ours.compilation_config.custom_ops == ["none", "+rotary_embedding"]
    for changes in (
        {"use_mla": True},
        {"uses_mrope": True},
        {"use_ubatching": True},
        {"splits": False},
        {"ops": ["none", "-rotary_embedding"]},
    ):
        other = config(**changes)
        before = str(other)
        assert not rope.prepare_config(other)
        assert str(other) == before
    monkeypatch.setattr(rope, "_USE_LAYERNAME", False)
    assert not rope.prepare_config(config())


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_cache_of_flash_attention_gets_what_vllm_writes_there(dtype, monkeypatch):
    """By the kernel, on an emulator; as by vLLM's embedding and FlashAttentionImpl, whose own kernel is played here."""
    from vllm.utils.torch_utils import _encode_layer_name
    from vllm.v1.attention.backend import AttentionType
    from vllm.v1.attention.backends import flash_attn

    from glq.vllm_integration import rope

    page, pages = 4, 6
    qkv, positions = torch.randn(TOKENS, sum(SIZES)).to(dtype), torch.randint(50, (TOKENS,))
    phase = torch.randn(50, HEAD // 2)
    angles = torch.cat((phase.cos(), phase.sin()), 1).to(dtype)
    slots = torch.tensor([9, -1, 3, 22])  # the last token is padding

    def write_each(key, value, key_cache, value_cache, slots, *_):
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                key_cache[slot // page, slot % page] = key[token]
                value_cache[slot // page, slot % page] = value[token]

    monkeypatch.setattr(flash_attn, "reshape_and_cache_flash", write_each, raising=False)
    attention = object.__new__(flash_attn.FlashAttentionImpl)
    attention.head_size, attention.attn_type, attention.kv_cache_dtype = HEAD, AttentionType.DECODER, "auto"
    layer = SimpleNamespace(impl=attention, _k_scale=None, _v_scale=None)

    def run(emulated):
        cache = torch.zeros(pages, KV_HEADS, page, 2 * HEAD, dtype=dtype)
        monkeypatch.setattr(rope, "get_attention_context", lambda _: (None, layer, cache, slots))
        monkeypatch.setattr(rope.cuda_rope, "works", lambda _: emulated)
        monkeypatch.setattr(rope.nvrtc, "gpu", lambda _: Emulator(4))
        q, k, v = qkv.split(SIZES, -1)
        given = (q, k, v.view(TOKENS, KV_HEADS, HEAD), positions, angles, HEAD, True, _encode_layer_name("layers.0"))
        return (*rope.rope_and_cache(*given)[:2], cache)

    theirs = run(emulated=False)
    monkeypatch.delattr(flash_attn, "reshape_and_cache_flash")  # nothing but the kernel writes now
    for ours, wanted in zip(run(emulated=True), theirs, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=2**-6, atol=2**-6)
    assert theirs[2].count_nonzero() > 0.9 * 3 * 2 * KV_HEADS * HEAD
