"""Steps: recorded, they do what the model did; fused, every kernel does what PyTorch's calls did."""

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from cubins import ARCHITECTURES, spilled
from emulator import Emulator
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, StaticCache

import glq.hf_integration
from glq.step.program import Attending, Fused, Program
from glq.step.proof import prove
from glq.step.record import record

emulated = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")
ONE, TWO = torch.float32, torch.bfloat16


def fuse(function, *inputs):
    """A program for a function, of which every kernel was tried out, and what the function returns."""
    inputs = [x.clone() for x in inputs]  # what is written in place is written more than once
    output, recording = record(lambda: function(*inputs))
    program = Program(recording, Emulator(3))
    return program, output


def prove_in_silence(program, step):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return prove(program, step)


def logits_apart(program, step, cache):
    """How far a program's logits are from the model's, relative to these; the cache is one step longer afterwards."""
    lengths = [layer.cumulative_length.clone() for layer in cache.layers]
    fused = program.run().logits.float()
    for layer, length in zip(cache.layers, lengths, strict=True):
        layer.cumulative_length.copy_(length)
    with torch.no_grad():
        exact = step().logits.float()
    return (fused - exact).norm() / exact.norm()


def checked(function, *inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a kernel that is wrong
        program, _ = fuse(function, *inputs)
        program.run(check=True)
    return program


def kernels(program):
    return [part.work.kernel for part in program.parts if isinstance(part.work, Fused) and part.work.kernel]


def plain(program):
    """Names of calls that PyTorch makes."""
    return [call.function.__name__ for part in program.parts if part.work is None for call in part.calls]


def random(*shape, dtype=TWO):
    return torch.randn(shape).to(dtype)


FUNCTIONS = {
    "arithmetic": lambda x, y: (x + y) * 2 - y / (x.abs() + 1) + (3 - x) * x.reciprocal(),
    "powers": lambda x, y: x**2 + x.abs() ** 0.5 + (x.abs() + 1) ** -0.5 + x**3 + (x.abs() + 1).rsqrt(),
    "functions": lambda x, y: x.exp() + x.sin() * y.cos() + x.tanh() + x.sigmoid() + x.abs().sqrt(),
    "activations": lambda x, y: functional.silu(x) * y + functional.gelu(x) + functional.gelu(y, approximate="tanh"),
    "relu": lambda x, y: functional.relu(x) - functional.relu(-y),
    "comparisons": lambda x, y: torch.where((x < y) & ~(x > 1) | (y == 0), x, y),
    "casts": lambda x, y: (x.float() * y.float()).to(x.dtype) + (x > 0).to(x.dtype) + (4 * y).long().to(x.dtype),
    "views": lambda x, y: x.transpose(0, 1)[:, 1:].clone() * y.T[:, :-1] + y[1:, None, 2:3, None].reshape(-1),
    "halves": lambda x, y: torch.cat([-x[..., 6:], x[..., :6]], -1) * y + torch.cat([y[:2], x[2:]], 0),
    "three parts": lambda x, y: torch.cat([*torch.cat([x, x[:, :0], y, x + y], 1).split(9, 1)][::-1], 1) * 2,
    "norm": lambda x, y: y * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype),
    "rows of rows": lambda x, y: x - (x * y.sum(-1, keepdim=True)).mean(-1, keepdim=True) * y.mean(-1)[:, None],
    "sum": lambda x, y: (x * y).sum(-1),
}


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_operations(name, dtype):
    program = checked(FUNCTIONS[name], random(5, 12, dtype=dtype), random(5, 12, dtype=dtype))
    assert plain(program) == []
    assert len(kernels(program)) == 1


@emulated
def test_a_norm_reduces_in_one_block_a_row():
    """Also of a sum that is needed later, and over another norm; heads of rows are rows, too."""

    def function(x, y, w):
        total = x + norm(y) * w
        return total, norm(total) * w, norm(total.view(3, 2, 8).transpose(0, 1)).transpose(1, 2)

    def norm(x):
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    program = checked(function, random(3, 16), random(3, 16), random(16))
    (kernel,) = kernels(program)
    assert len(kernel.outputs) == 3
    assert kernel.blocks == 3 + 3 + 6


@emulated
def test_rows_of_another_direction():
    """The mean of a row stands in a column: a block an element, or PyTorch."""
    program = checked(lambda x: x + x.mean(-1)[None], random(6, 6))
    assert [kernel.blocks for kernel in kernels(program)] == [36]
    program = checked(lambda x: x + x.mean(-1)[None], random(40, 40))
    assert plain(program) == ["mean.dim", "add.Tensor"]


@emulated
def test_integers_and_numbers():
    def function(n, x):
        return n + 1, n * n - 2**40, n.float() / 3, torch.where(n > 2, x, 0.0), n == 3, 1e-3 + x, x * float("inf")

    program = checked(function, torch.arange(7), torch.randn(7))
    assert set(plain(program)) <= {"where.ScalarOther"}


@emulated
def test_constants_are_made_once():
    program = checked(lambda x: x + torch.arange(5) + torch.ones(3, 5), random(3, 5))
    assert plain(program) == []
    program = checked(lambda x: x + torch.zeros(5).add_(x.sum()), random(5))
    assert "zeros.default" in plain(program)


@emulated
def test_what_is_random_stays_random():
    program, _ = fuse(lambda x: x + torch.rand(3), torch.zeros(3))
    assert not torch.equal(program.run(), program.run())


@emulated
def test_updates_in_place():
    """Reads before and after, in the order of the calls."""

    def function(cache, length, new, other):
        place = torch.arange(1) + length
        length.add_(1)
        cache.index_copy_(1, place, new * 2)
        cache.index_copy_(1, place + 2, other)
        return cache.sum(-1) + length, place

    inputs = [torch.zeros(3, 8, 6), torch.tensor(2), torch.randn(3, 1, 6), torch.randn(3, 1, 6)]
    checked(function, *inputs)
    ours, theirs = [[x.clone() for x in inputs] for _ in range(2)]
    _, recording = record(lambda: function(*ours))
    program = Program(recording, Emulator(1))
    assert plain(program) == []
    function(*theirs)
    for _ in range(2):
        for made, expected in zip(program.run(), function(*theirs), strict=True):
            torch.testing.assert_close(made, expected)
        for made, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(made, expected)


@emulated
@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: (y * 2, x.add_(y), x * y, y.add_(1), y + x)[2:],
        lambda x, y: (x.view(-1).add_(1), x.add_(y), x[1:].add_(3), x + 0)[3],
        lambda x, y: (x[::2].add_(y[::2]), x.index_copy_(0, torch.tensor([1, 0]), y[:2]), x.clone())[2],
        lambda x, y: torch.zeros_like(y).add_(y).add_(x),
    ],
)
def test_updates_keep_their_order(function):
    inputs = [torch.randn(4, 4), torch.randn(4, 4)]
    ours, theirs = [[x.clone() for x in inputs] for _ in range(2)]
    _, recording = record(lambda: function(*ours))
    function(*theirs)
    program = Program(recording, Emulator(1))
    for _ in range(2):
        made, expected = program.run(), function(*theirs)
        for a, b in zip((*ours, *made), (*theirs, *expected), strict=True):
            torch.testing.assert_close(a, b)


@emulated
def test_a_place_beyond_the_cache_is_refused():
    here = Path(__file__).parent
    code = f"import sys; sys.path[:0] = [{str(here)!r}]; import conftest, test_step; test_step.write_beyond()"
    done = subprocess.run([sys.executable, "-c", code], cwd=here.parent, capture_output=True, text=True)
    assert done.returncode != 0
    assert "trap" in done.stderr


def write_beyond():
    cache, place = torch.zeros(4, 3), torch.tensor([1])
    _, recording = record(lambda: cache.index_copy_(0, place, torch.ones(1, 3)))
    place.fill_(4)
    Program(recording, Emulator(1)).run()


@emulated
def test_a_wrong_kernel_is_not_used(monkeypatch):
    monkeypatch.setitem(glq.step.formulas._FLOAT_FORMULAS, torch.ops.aten.exp.default, "sinf({0})")
    program, _ = fuse(lambda x: x.exp() + 1, torch.randn(4))
    with pytest.warns(UserWarning, match="a kernel for exp_add is not used: it computes something else"):
        expected = program.run(check=True)
    assert torch.equal(program.run(), expected)


SIZES = {
    "vocab_size": 302,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 16,
    "pad_token_id": 0,
    "eos_token_id": None,
}
MODELS = ["Llama", "Qwen3", "Gemma", "Olmo2", "Phi3"]


def steps(model, batch=1, length=24):
    """A function that does the next step on inputs that stay where they are, and one that sets them."""
    cache = StaticCache(config=model.config, max_cache_len=length)
    ids = torch.randint(2, 300, (batch, length))
    with torch.no_grad():
        model(input_ids=ids[:, :3], past_key_values=cache)
    inputs = {
        "input_ids": torch.zeros(batch, 1, dtype=torch.long),
        "attention_mask": torch.zeros(batch, 1, 1, length, dtype=torch.bool),
        "position_ids": torch.zeros(batch, 1, dtype=torch.long),
    }

    def move(at):
        inputs["input_ids"].copy_(ids[:, at : at + 1])
        inputs["position_ids"].fill_(at)
        inputs["attention_mask"].copy_(torch.arange(length) <= at)

    return move, lambda: model(past_key_values=cache, return_dict=True, **inputs), cache


@emulated
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, batch):
    """Recorded, a step does bit by bit what the model does; fused, it does so but for rounding, with few kernels."""
    config = getattr(transformers, f"{name}Config")(**SIZES)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(TWO).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) / 10  # norms, too
    move, step, cache = steps(model, batch)
    move(3)
    _, recording = record(step)
    program = Program(recording, Emulator(2))
    move(4)
    proof = prove_in_silence(program, step)
    assert proof.right
    assert not proof.remark
    assert cache.get_seq_length() == 5
    for at in (5, 6):
        move(at)
        assert logits_apart(program, step, cache) < 0.02
        assert cache.get_seq_length() == at + 1
    assert len(kernels(program)) <= 7 * len(model.model.layers) + 2
    assert {*plain(program)} <= {"mm.default", "bmm.default", "embedding.default", "addmm.default"}


@emulated
def test_a_quantized_model(tiny_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=TWO)
    move, step, _ = steps(model)
    move(3)
    _, recording = record(step)
    program = Program(recording, Emulator(2))
    move(4)
    assert prove_in_silence(program, step).right
    layers = len(model.model.layers)
    assert plain(program).count("matmul.default") == 4 * layers
    assert len(kernels(program)) <= 4 * layers + 2  # one more with transformers 5.17 than with 5.23
    assert sum(isinstance(part.work, Attending) for part in program.parts) == layers


class Returns(nn.Module):
    def forward(self, x):
        h = x * 2
        return {"hidden": (x, h, h[1:]), "last": (h + 1).clone(), "none": None, "number": 3}


@emulated
def test_outputs_of_any_structure():
    x = torch.randn(3, 4)
    model = Returns()
    expected, recording = record(lambda: model(x))
    program = Program(recording, Emulator(1))
    x.normal_()
    made, expected = program.run(), model(x)
    assert made["hidden"][0] is x
    for a, b in zip((*made["hidden"], made["last"]), (*expected["hidden"], expected["last"]), strict=True):
        torch.testing.assert_close(a, b)
    assert (made["none"], made["number"]) == (None, 3)


def test_memory_is_free_when_it_is_not_needed():
    a = torch.randn(2, 2)
    _, recording = record(lambda: a.mm(a).mm(a).mm(a))
    assert [len(part.last) for part in Program(recording, Emulator(1)).parts] == [0, 1, 1]


def test_kernels_compile_for_every_architecture():
    """Of a model's step; with no spills."""
    pytest.importorskip("cuda.core")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(TWO).eval()
    move, step, _ = steps(model)
    move(3)
    _, recording = record(step)
    sources = {kernel.source for kernel in kernels(Program(recording, Emulator(1)))}
    assert len(sources) >= 5
    for source in sources:
        for arch in ARCHITECTURES:
            code, report = source.compile_and_report(arch)
            assert len(code) > 0
            assert spilled(report) == {0}
