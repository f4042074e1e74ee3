"""Siblings: what they compute together is what they compute alone, in one product, whatever happens to the model."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from safetensors.torch import load_file
from test_matmul import random_packed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import glq.hf_integration
from glq.fused import fuse
from glq.linear import QuantLinear

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NAMES = ("q", "k", "v")


class Attention(nn.Module):
    """Three layers that read one input and one that does not."""

    def __init__(self, codecs=("trellis-3",) * 3, rows=(128, 64, 40), signs=(0, 0, 0), bias=False):
        super().__init__()
        for i, (name, codec, out, seed) in enumerate(zip(NAMES, codecs, rows, signs, strict=True)):
            packed = random_packed(codec, out, 96, 96, seed=i)
            packed.signs.copy_(random_packed("trellis-3", 64, 96, 96, seed=seed).signs)
            setattr(self, name, QuantLinear.from_packed(packed, torch.randn(out) if bias else None))
        self.o = QuantLinear.from_packed(random_packed("trellis-3", 96, rows[0], rows[0]))

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q), k.sin(), v.cos()


class Products(TorchDispatchMode):
    """Counts products, by their number of rows."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.glq.matmul.default:
            self.rows.append(args[5])
        return op(*args, **(kwargs or {}))


def products(model, *args):
    with Products() as counted:
        model(*args)
    return counted.rows


def pair(**settings):
    """The same layers alone and fused."""
    torch.manual_seed(0)
    alone = Attention(**settings)
    fused = copy.deepcopy(alone)
    fuse(fused)
    return alone, fused


def assert_same(a, b, x):
    for y, z in zip(a(x), b(x), strict=True):
        assert y.shape == z.shape
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)


def in_one_tensor(model, names=NAMES):
    """Whether the siblings' codes and scales share memory, and waiting outputs were all taken."""
    layers = [getattr(model, name) for name in names]
    shared = all(len({getattr(m, t).untyped_storage().data_ptr() for m in layers}) == 1 for t in ("codes", "scale"))
    return shared and layers[0].siblings._waiting is None


@pytest.mark.parametrize("codec", ["trellis-3", "trellis-1.5", "e8-2", "nested-3.5"])
@pytest.mark.parametrize("rows", [(128, 64, 40), (40, 70, 33), (64, 64, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_siblings_are_one_product(codec, rows, bias):
    alone, fused = pair(codecs=(codec,) * 3, rows=rows, bias=bias)
    for shape in ((1, 96), (2, 5, 96), (96,), (0, 96)):
        assert_same(alone, fused, torch.randn(shape))
    x = torch.randn(3, 96)
    assert len(products(alone, x)) == 4
    assert len(products(fused, x)) == 2
    assert in_one_tensor(fused)
    for name in NAMES:
        a, b = getattr(alone, name), getattr(fused, name)
        assert torch.equal(a.packed.dequantize(), b.packed.dequantize())
        assert torch.equal(a.dequantize(torch.float32)(x), b.dequantize(torch.float32)(x))
    assert list(alone.state_dict()) == list(fused.state_dict())
    assert all(torch.equal(t, fused.state_dict()[name]) for name, t in alone.state_dict().items())


def test_any_order_and_any_layer_first():
    alone, fused = pair()
    x = torch.randn(2, 96)
    for order in ("qkv", "vkq", "kvq"):
        with Products() as counted:
            outputs = {name: getattr(fused, name)(x) for name in order}
        assert len(counted.rows) == 1
        for name, y in outputs.items():
            torch.testing.assert_close(y, getattr(alone, name)(x), rtol=1e-5, atol=1e-5)
        assert in_one_tensor(fused)


@pytest.mark.parametrize(
    ("settings", "joined"),
    [
        ({"codecs": ("trellis-3", "trellis-3", "nested-4")}, 2),
        ({"codecs": ("trellis-2", "trellis-3", "nested-4")}, 0),
        ({"signs": (0, 7, 7)}, 2),
        ({"signs": (0, 1, 2)}, 0),
    ],
)
def test_only_equal_codecs_and_signs_are_joined(settings, joined):
    alone, fused = pair(**settings)
    assert sum(getattr(fused, name).siblings is not None for name in NAMES) == joined
    assert_same(alone, fused, torch.randn(2, 96))
    assert len(products(fused, torch.randn(2, 96))) == 4 - max(0, joined - 1)


def test_an_input_that_differs_is_multiplied_alone():
    alone, fused = pair()
    x = torch.randn(2, 96)
    for name in NAMES:  # equal values, but another tensor
        y = x.clone()
        torch.testing.assert_close(getattr(fused, name)(y), getattr(alone, name)(y), rtol=1e-5, atol=1e-5)
    fused.q(x)
    x.mul_(2)  # the same tensor, changed in between
    torch.testing.assert_close(fused.k(x), alone.k(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused.q(x), fused.q(x))
    assert_same(alone, fused, x)


def test_layers_that_are_never_called_together_part():
    alone, fused = pair()
    for _ in range(12):
        x = torch.randn(2, 96)
        torch.testing.assert_close(fused.k(x), alone.k(x), rtol=1e-5, atol=1e-5)
    assert fused.q.siblings._waiting is None
    with Products() as counted:
        fused.k(x)
    assert counted.rows == [64]
    fused.to("cpu")  # joined again, or a wrong start would cost for ever
    assert len(products(fused, x)) == 2


def test_nothing_is_kept_of_what_was_taken():
    _, fused = pair()
    x = torch.randn(2, 96)
    seen = weakref.ref(x)
    outputs = [weakref.ref(y) for y in fused(x)]
    del x
    assert seen() is None
    assert all(y() is None for y in outputs)
    codes = weakref.ref(fused.q.siblings._codes)
    gc.disable()
    try:
        del fused
        assert codes() is None  # no cycle keeps a deleted model's memory
    finally:
        gc.enable()


def test_inference_mode_has_no_versions():
    alone, fused = pair()
    with torch.inference_mode():
        x = torch.randn(2, 96)
        assert_same(alone, fused, x)
        fused.q(x)
        x.mul_(2)
        torch.testing.assert_close(fused.k(x), alone.k(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "move", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double().float(), lambda m: m.to("meta")]
)
def test_moves(move):
    alone, fused = pair(bias=True)
    move(alone), move(fused)
    x = torch.randn(2, 96, dtype=alone.q.scale.dtype, device=alone.q.codes.device)
    if x.is_meta:
        assert [y.shape for y in fused(x)] == [y.shape for y in alone(x)]
        return
    assert in_one_tensor(fused)
    assert len(products(fused, x)) == 2
    for y, z in zip(alone(x), fused(x), strict=True):
        assert (y.double() - z.double()).norm() <= torch.finfo(x.dtype).eps * y.double().norm()


def test_buffers_replaced_from_outside():
    alone, fused = pair()
    for model in (alone, fused):
        model.k.codes = alone.k.codes.flip(0).clone()
    assert_same(alone, fused, torch.randn(2, 96))
    fused.float()
    assert_same(alone, fused, torch.randn(2, 96))
    assert in_one_tensor(fused)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(assign):
    alone, fused = pair()
    other = Attention(signs=(5, 5, 6))
    for model in (alone, fused):
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    x = torch.randn(2, 96)
    assert_same(alone, fused, x)
    assert len(products(fused, x)) == 4  # signs that differ
    other = Attention(signs=(5, 5, 5))
    for model in (alone, fused):
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert_same(alone, fused, x)
    assert len(products(fused, x)) == 2


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch])
def test_copies(again):
    alone, fused = pair(bias=True)
    x = torch.randn(2, 96)
    fused.q(x)  # outputs are waiting: they stay here
    other = again(fused)
    assert in_one_tensor(other)
    assert other.q.siblings is other.k.siblings is not fused.q.siblings
    assert other.q.codes.untyped_storage().data_ptr() != fused.q.codes.untyped_storage().data_ptr()
    for model in (other, fused):
        assert_same(alone, model, x)
        assert len(products(model, x)) == 2
    other.k.codes.zero_()
    assert_same(alone, fused, x)
    assert len(pickle.dumps(fused)) < 1.05 * len(pickle.dumps(alone)) + 2000


def test_copies_of_one_layer():
    alone, fused = pair()
    x = torch.randn(2, 96)
    for part in (copy.deepcopy(fused.k), copy.copy(fused.k)):
        assert part.codes.untyped_storage().nbytes() == alone.k.codes.numel()
        torch.testing.assert_close(part(x), alone.k(x), rtol=1e-5, atol=1e-5)
        assert len(products(fused, x)) == 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend):
    alone, fused = pair(bias=True)
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    x = torch.randn(2, 96)
    with torch.no_grad():
        assert_same(alone, compiled, x)
        assert in_one_tensor(fused)
        fused(x)  # outputs of eager calls and of compiled ones do not meet
        assert_same(alone, compiled, x)
        fused.q(x)
        assert_same(alone, compiled, x)
        assert_same(alone, fused, x)
        fused.bfloat16()
        assert [y.dtype for y in compiled(x.bfloat16())] == [torch.bfloat16] * 3


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_graph_has_one_product(backend):
    from torch._dynamo.backends.common import aot_autograd

    _, fused = pair()
    found = []

    def count(graph, inputs):
        found.append(
            sum("glq.matmul" in str(node.target) or node.name.startswith("matmul") for node in graph.graph.nodes)
        )
        return graph.forward

    chosen = count if backend == "eager" else aot_autograd(fw_compiler=count)
    with torch.no_grad():
        torch.compile(fused, fullgraph=True, backend=chosen)(torch.randn(2, 96))
    assert found == [2]


@needs_gpu
def test_in_a_cuda_graph():
    alone, fused = pair(bias=True)
    alone.cuda().half(), fused.cuda().half()
    assert in_one_tensor(fused)
    x = torch.randn(1, 96, device="cuda").half()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        fused(x)
        assert len(products(fused, x)) == 2
        with torch.cuda.graph(graph):
            captured = fused(x)
        assert in_one_tensor(fused)  # nothing captured waits for eager calls
        x.normal_()
        graph.replay()
        for outputs in (captured, fused(x)):
            for y, z in zip(outputs, alone(x), strict=True):
                assert (y.double() - z.double()).norm() < 2e-3 * z.double().norm()


def test_threads_get_what_they_ask_for():
    alone, fused = pair()
    wrong = []

    def work(seed):
        x = torch.randn(2, 96, generator=torch.Generator().manual_seed(seed))
        for _ in range(50):
            for y, z in zip(alone(x), fused(x), strict=True):
                if not torch.allclose(y, z, rtol=1e-5, atol=1e-5):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_loaded_model_is_fused(tiny_checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert attention.q_proj.siblings is attention.k_proj.siblings is attention.v_proj.siblings is not None
    assert mlp.gate_proj.siblings is mlp.up_proj.siblings is not attention.q_proj.siblings
    assert attention.o_proj.siblings is mlp.down_proj.siblings is None
    ids = torch.arange(60)[None]
    assert len(products(model, ids)) == 2 * 4
    logits = model(ids).logits
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.siblings = None
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_save_pretrained_writes_what_was_read(tiny_checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype="auto")
    model.save_pretrained(tmp_path / "saved")
    before, after = (load_file(d / "model.safetensors") for d in (tiny_checkpoint, tmp_path / "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    sizes = [(d / "model.safetensors").stat().st_size for d in (tiny_checkpoint, tmp_path / "saved")]
    assert abs(sizes[0] - sizes[1]) < 1000
    assert glq.hf_integration.load(tmp_path / "saved", device="cpu") is not None


def test_device_map_hooks(tiny_checkpoint):
    """accelerate wraps forward passes; a hooked sibling still takes its output, and offloaded ones compute alone."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    alone, fused = pair()
    x = torch.randn(2, 96)
    for name in NAMES:
        add_hook_to_module(getattr(fused, name), AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert_same(alone, fused, x)
    assert len(products(fused, x)) == 2
    held = {name: t.clone() for name, t in fused.k.named_buffers()}
    add_hook_to_module(fused.k, AlignDevicesHook("cpu", offload=True, weights_map=held, offload_buffers=True))
    assert fused.k.codes.is_meta
    for _ in range(2):
        assert_same(alone, fused, x)
