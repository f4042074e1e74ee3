"""Products that make their x in steps: which calls are one, which stay, and that a wrong one is found out."""

import pytest
import torch
import transformers
from emulator import Emulator
from test_step import SIZES, checked, emulated, fuse, kernels, logits_apart, plain, prove_in_silence, random, steps
from torch import nn
from torch.nn import functional

import glq.ops.matmul
from glq.fused import fuse as join
from glq.linear import QuantLinear
from glq.ops.fused_matmul import norm_matmul, silu_matmul
from glq.packed import decode_matrix
from glq.step import products
from glq.step.program import Multiplying, Program
from glq.step.record import record
from glq.step.rounding import close_products

WIDE = SIZES | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


@pytest.fixture(autouse=True)
def decode_once(monkeypatch):
    """Codes that stay the same: decoding them without a GPU is what would take long here."""
    decoded = {}

    def decode(codes, *kind):
        key = (codes.data_ptr(), *kind)
        if key not in decoded:
            decoded[key] = codes, decode_matrix(codes, *kind)
        return decoded[key][1]

    monkeypatch.setattr(glq.ops.matmul, "decode_matrix", decode)


def random_product(in_features, out_features, codec="trellis-2", block=256):
    layer = QuantLinear(in_features, out_features, codec, block)
    layer.codes.random_(256)
    layer.scale.copy_((torch.rand(out_features) + 0.5) / in_features**0.5)
    layer.signs.fill_(0x5A)
    return layer


def random_model(name, codecs):
    """A model whose layers' products are quantized, by trellis-2 where codecs does not say otherwise."""
    config = getattr(transformers, f"{name}Config")(**WIDE)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.bfloat16).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) / 10  # norms, too
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and (path != "lm_head" or "lm_head" in codecs):
            parent, _, own = path.rpartition(".")
            new = random_product(layer.in_features, layer.out_features, codecs.get(own, "trellis-2"))
            if own == "o_proj":
                new.signs.fill_(0xC3)  # it has another input than q, k and v
            new.bias = layer.bias
            setattr(model.get_submodule(parent), own, new)
    join(model)
    return model


def found(program):
    """How many normed sums, and how many silu(gate) · up."""
    functions = [part.work.what.function for part in program.parts if isinstance(part.work, Multiplying)]
    return functions.count(norm_matmul), functions.count(silu_matmul)


def program_of_a_step(model, batch=1):
    """Proved, and then compared with the model once more."""
    move, step, cache = steps(model, batch)
    move(3)
    _, recording = record(step)
    program = Program(recording, Emulator(2))
    before = found(program)
    move(4)
    assert prove_in_silence(program, step).right
    assert found(program) == before
    move(5)
    assert logits_apart(program, step, cache) < 0.03
    return program


@emulated
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_models(name, batch):
    """Two layers: all but the first norm and the last, whose product is none of ours, and every MLP."""
    program = program_of_a_step(random_model(name, {}), batch)
    assert found(program) == (3, 2)
    assert not any("silu" in kernel.name for kernel in kernels(program))
    others = {"Qwen3": 2}.get(name, 0)  # of heads' queries and keys
    assert sum("rsqrt" in kernel.name for kernel in kernels(program)) == 2 + others


@emulated
def test_a_quantized_head():
    assert found(program_of_a_step(random_model("Llama", {"lm_head": "trellis-3"}))) == (4, 2)


@emulated
@pytest.mark.parametrize("codecs", [{"down_proj": "nested-3"}, {"q_proj": "e8-2", "k_proj": "e8-2", "v_proj": "e8-2"}])
def test_codecs_of_every_kind(codecs):
    assert found(program_of_a_step(random_model("Llama", codecs))) == (3, 2)


@emulated
@pytest.mark.parametrize(
    ("name", "codecs", "expected"),
    [
        ("Gemma", {}, (0, 0)),  # (1 + weight) in fp32, gelu
        ("Olmo2", {}, (0, 2)),  # norms behind products
        ("Llama", {"k_proj": "trellis-3"}, (2, 2)),  # two readers
        ("Llama", {"up_proj": "trellis-3"}, (1, 2)),  # likewise; gate and up lie apart
    ],
)
def test_what_differs_stays(name, codecs, expected):
    assert found(program_of_a_step(random_model(name, codecs))) == expected


@emulated
def test_rotations_without_kernels():
    """Of three times 128 columns; rows for more tokens than are made on the way."""
    narrow = random_product(384, 64, block=384)
    few, many = random(2, 384), random(2, 384)
    assert found(checked(lambda g, u: narrow(functional.silu(g) * u), few, many)) == (0, 0)
    layer = random_product(256, 64)
    for tokens, expected in ((2048, 1), (2049, 0)):
        program = checked(lambda g, u: layer(functional.silu(g) * u), random(tokens, 256), random(tokens, 256))
        assert found(program) == (0, expected)
    assert found(checked(lambda g, u: layer(functional.silu(g) * u), torch.randn(2, 256), torch.randn(2, 256)))[1] == 0


def norm(x, w, eps=1e-5):
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


LAYER = QuantLinear(256, 64, "trellis-2", 256)
NORMS = {  # of x, r and a weight: whether it is one op
    "sum is read later": (lambda x, r, w: (LAYER(norm(t := x + r, w)), t * 2), True),
    "sum is returned": (lambda x, r, w: (LAYER(norm(t := x + r, w)), t), True),
    "sum is nobody's": (lambda x, r, w: LAYER(norm(x + r, w)), True),
    "small calls between": (lambda x, r, w: ((t := x + r), (n := norm(t, w)), x * r, LAYER(n))[2:], True),
    "sum is changed later": (lambda x, r, w: ((t := x + r), LAYER(norm(t, w)), t.add_(1))[1:], True),
    "another is changed between": (lambda x, r, w: ((n := norm(x + r, w)), x.clone().add_(1), LAYER(n))[1:], True),
    "views": (lambda x, r, w: LAYER(norm(x[1:] + r[:-1], w)[None]), False),
    "rows of something": (lambda x, r, w: LAYER(norm(x[1:] + r[:-1], w)), True),
    "x is changed between": (lambda x, r, w: ((n := norm(x + r, w)), x.add_(1), LAYER(n))[2], False),
    "residual is changed between": (lambda x, r, w: ((t := x + r), r.add_(t), LAYER(norm(t, w)))[1:], False),
    "sum is changed between": (lambda x, r, w: ((t := x + r), t.add_(1), LAYER(norm(t, w)))[2], False),
    "weight is changed between": (lambda x, r, w: ((n := norm(x + r, w)), w.add_(1), LAYER(n))[2], False),
    "sum is read between": (lambda x, r, w: ((t := x + r), (u := t.sin()), LAYER(norm(t, w)), u)[2:], False),
    "norm is read later": (lambda x, r, w: (LAYER(n := norm(x + r, w)), n * 2), False),
    "norm is returned": (lambda x, r, w: (LAYER(n := norm(x + r, w)), n), False),
    "norm is multiplied twice": (lambda x, r, w: (LAYER(n := norm(x + r, w)), LAYER(n)), False),
    "two norms of a sum": (lambda x, r, w: (LAYER(norm(t := x + r, w)), LAYER(norm(t, w)[:2])), True),
    "no sum": (lambda x, r, w: LAYER(norm(x, w)) + r[..., :64], False),
    "a scaled sum": (lambda x, r, w: LAYER(norm(torch.add(x, r, alpha=2), w)), False),
    "a broadcast sum": (lambda x, r, w: LAYER(norm(x + r[0], w)), False),
    "a sum of one number": (lambda x, r, w: LAYER(norm(x + 1, w)), False),
    "weights for each token": (lambda x, r, w: LAYER(norm(x + r, x)), False),
    "a weight that is made": (lambda x, r, w: LAYER(norm(x + r, 1 + w)), False),
    "a weight in fp32": (lambda x, r, w: LAYER(norm(x + r, w.float()).to(x.dtype)), False),
    "eps of each token": (lambda x, r, w: LAYER(norm(x + r, w, x.abs().float()[:, :1])), False),
    "a mean of all": (
        lambda x, r, w: LAYER(w * ((t := (x + r).float()) * torch.rsqrt(t.pow(2).mean() + 1e-5)).to(x.dtype)),
        False,
    ),
    "in bf16": (lambda x, r, w: LAYER(w * ((t := x + r) * torch.rsqrt(t.pow(2).mean(-1, True) + 1e-5))), False),
    "apart": (lambda x, r, w: LAYER(norm(x.T.contiguous().T + r, w)), False),
}


@emulated
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_norms(name, dtype):
    """Also in place: the program does what the function does, twice."""
    function, expected = NORMS[name]
    same_product_as(random_product(256, 64))
    inputs = [random(3, 256, dtype=dtype), random(3, 256, dtype=dtype), random(256, dtype=dtype)]
    assert found(checked(function, *inputs)) == (int(expected), 0)
    ours, theirs = [[x.clone() for x in inputs] for _ in range(2)]
    _, recording = record(lambda: function(*ours))
    program = Program(recording, Emulator(1))
    function(*theirs)
    for _ in range(2):
        made, wanted = program.run(), function(*theirs)
        made, wanted = (t if isinstance(t, tuple) else (t,) for t in (made, wanted))
        for a, b in zip((*ours, *made), (*theirs, *wanted), strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def same_product_as(layer):
    LAYER.load_state_dict(layer.state_dict())


SILUS = {
    "two tensors": (lambda g, u: LAYER(functional.silu(g) * u), True),
    "the other way round": (lambda g, u: LAYER(u * functional.silu(g)), True),
    "halves": (lambda g, u: LAYER(functional.silu(g.view(2, 512)[:, :256]) * g.view(2, 512)[:, 256:]), True),
    "both": (lambda g, u: LAYER(functional.silu(g) * functional.silu(u)), True),
    "gate is read later": (lambda g, u: (LAYER(functional.silu(g * 2) * u), g * 2), True),
    "gate is changed between": (lambda g, u: ((x := functional.silu(g) * u), g.add_(1), LAYER(x))[2], False),
    "gate is changed through a view": (
        lambda g, u: ((x := functional.silu(g[1:]) * u[1:]), g[:1].add_(1), LAYER(x))[2],
        False,
    ),
    "product is read later": (lambda g, u: (LAYER(x := functional.silu(g) * u), x + 1), False),
    "silu is read later": (lambda g, u: (LAYER((s := functional.silu(g)) * u), s + 1), False),
    "gelu": (lambda g, u: LAYER(functional.gelu(g) * u), False),
    "a row for all": (lambda g, u: LAYER(functional.silu(g) * u[0]), False),
    "a number": (lambda g, u: LAYER(functional.silu(g) * 2), False),
    "columns apart": (lambda g, u: LAYER(functional.silu(g.view(2, 256, 2)[..., 0]) * u[:2]), False),
    "rows begin anywhere": (lambda g, u: LAYER(functional.silu(g.view(-1)[1:257]) * u.view(-1)[1:257]), False),
}


@emulated
@pytest.mark.parametrize("name", SILUS)
def test_silus(name):
    function, expected = SILUS[name]
    same_product_as(random_product(256, 64))
    assert found(checked(function, random(4, 256), random(4, 256))) == (0, int(expected))


@emulated
def test_memory_that_two_tensors_share():
    """A change of one between the calls is a change of the other."""
    layer, whole = random_product(256, 64), random(4, 256)
    gate, other, up = whole[:2], whole[1:3], random(2, 256)

    def function():
        x = functional.silu(gate) * up
        other.add_(1)
        return layer(x)

    _, recording = record(function)
    assert found(Program(recording, Emulator(1))) == (0, 0)


@emulated
@pytest.mark.parametrize(
    "mistake",
    [
        lambda y, total: (y * 1.1, total),
        lambda y, total: (y.flip(0), total),
        lambda y, total: (y, total * 1.1),
        lambda y, total: (torch.cat([y[..., :-2], -y[..., -2:]], -1), total),
    ],
)
def test_a_wrong_product_is_not_used(monkeypatch, mistake):
    monkeypatch.setattr(products, "norm_matmul", lambda *given: mistake(*norm_matmul(*given)))
    layer = random_product(256, 64)
    program, _ = fuse(lambda x, r, w: layer(norm(x + r, w)) * 2, random(3, 256), random(3, 256), random(256))
    with pytest.warns(UserWarning, match="a kernel for add_to_copy_pow_mean_rsqrt_mul_matmul is not used"):
        expected = program.run(check=True)
    assert found(program) == (0, 0)
    torch.testing.assert_close(program.run(), expected)
    assert "matmul.default" in plain(program)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_of_x_is_no_mistake(dtype):
    """Normed values of which some are far larger than others, rounded twice or not at all."""
    x, weight = torch.randn(32, 2048), torch.rand(2048) + 0.5
    x[:, :4] *= 100
    x, weight = x.to(dtype), weight.to(dtype)
    layer = random_product(2048, 512, block=2048)
    w = layer.packed.dequantize()
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    expected = ((wide.to(dtype) * weight).float() @ w.T).to(dtype)
    y = ((wide * weight.float()) @ w.T).to(dtype)
    assert not torch.equal(y, expected)
    assert close_products(y, expected)
    padded = expected.clone()
    padded[3] = torch.nan  # a sequence that sees nothing
    assert close_products(padded.clone(), padded)
    assert not close_products(y, padded)
    for wrong in (y * (1 + 8 * torch.finfo(dtype).eps), y.roll(1, 0), torch.cat([y[:, :-1], y[:, :1]], 1)):
        assert not close_products(wrong, expected)


def test_memory_is_free_when_it_is_not_needed():
    """What only the calls of a product have made is gone after it; a sum, after its last reader."""
    layer = random_product(256, 256)
    x, r, w = random(3, 256), random(3, 256), random(256)
    _, recording = record(lambda: layer(norm(t := x + r, w)).mm(t.T).mm(t))
    program = Program(recording, Emulator(1))
    assert found(program) == (1, 0)
    assert [len(part.calls) for part in program.parts] == [10, 1, 1]
    assert [len(part.last) for part in program.parts] == [8, 1, 2]
