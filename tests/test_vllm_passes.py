"""The pass over vLLM's graphs: what it fuses and what it leaves, in small graphs and in a compiled engine."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from test_vllm import PROMPTS, pytestmark, vllm  # noqa: F401
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import gelu, silu

import glq
from glq.errors import GlqError
from glq.ops.matmul import matmul
from glq.packed import packed_shapes

COLUMNS = 128
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # vLLM's norm does not round the sum first


class Case:
    """A function of a product and tensors, its graph as Inductor traces it, and that graph after the pass."""

    def __init__(self, function, inputs, table, own_sums):
        from glq.vllm_integration.passes import FuseIntoProducts

        self.graph = make_fx(function, table, tracing_mode="symbolic")(*inputs)
        self.before, text, expected = self.ops(), str(self.graph.graph), self.graph(*inputs)
        FuseIntoProducts(own_sums)(self.graph.graph)
        self.graph.graph.lint()
        self.graph.recompile()
        self.after, self.untouched = self.ops(), str(self.graph.graph) == text
        values = Values(self.graph)
        for result, wanted in zip(values.run(*inputs), expected, strict=True):
            assert result.dtype == wanted.dtype
            assert (result - wanted).norm() <= TOLERANCE[result.dtype] * wanted.norm()
        assert values.wrong == []

    def ops(self):
        names = [str(node.target) for node in self.graph.graph.nodes if node.op == "call_function"]
        return [name.split(".")[1] for name in names if name.startswith(("glq.", "vllm_ir."))]


class Values(torch.fx.Interpreter):
    """Runs a graph and collects the nodes whose values are not of the type and shape that they say."""

    def __init__(self, graph):
        super().__init__(graph)
        self.wrong = []

    def run_node(self, n):
        result, said = super().run_node(n), n.meta.get("val")
        if isinstance(result, torch.Tensor) and n.op == "call_function":
            alike = (result.dtype, list(result.shape)) == (said.dtype, [int(size) for size in said.shape])
            self.wrong += [] if alike else [n]
        return result


@pytest.fixture
def case():
    """Of a function whose first argument multiplies by a packed matrix."""
    shapes = packed_shapes("trellis-3", 64, COLUMNS)
    codes = torch.randint(0, 256, shapes["codes"], dtype=torch.uint8)
    signs = torch.randint(0, 256, shapes["signs"], dtype=torch.uint8)
    weight = (codes, torch.rand(64).add(0.5).half(), signs)

    def run(function, *inputs, decompose=True, own_sums=False):
        from torch._inductor.decomposition import select_decomp_table

        def with_weight(codes, scale, signs, *inputs):
            return function(lambda x: matmul(x, codes, scale, signs, "trellis-3", 64, COLUMNS), *inputs)

        return Case(with_weight, (*weight, *inputs), select_decomp_table() if decompose else {}, own_sums)

    return run


def norm(x, residual, weight, eps=1e-5, *variance_size):
    from vllm.ir.ops import fused_add_rms_norm

    return fused_add_rms_norm.torch_op(x, residual, weight, eps, *variance_size)


def rows(dtype=torch.float32, columns=COLUMNS):
    return torch.randn(5, columns, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_normed_sum_becomes_part_of_its_product(dtype, case):
    def layer(product, x, residual, weight):
        y, total = norm(x, residual, weight)
        return product(y), total + 1, total

    done = case(layer, rows(dtype), rows(dtype), rows(dtype)[0])
    assert done.before == ["fused_add_rms_norm", "matmul"]
    assert done.after == ["norm_matmul"]


def test_a_sum_may_be_read_ahead_of_the_product_or_not_at_all(case):
    def early(product, x, residual, weight):
        y, total = norm(x, residual, weight)
        early = total.exp()
        return early, product(y)

    def never(product, x, residual, weight):
        return (product(norm(x, residual, weight)[0]),)

    for layer in (early, never):
        assert case(layer, rows(), rows(), rows()[0]).after == ["norm_matmul"]


def test_sums_over_ranks_are_ours_if_asked_for_and_vllms_where_they_have_no_inboxes(case, monkeypatch):
    from vllm.distributed import parallel_state

    group = SimpleNamespace(_all_reduce_out_place=lambda x: 3 * x)
    monkeypatch.setitem(parallel_state._groups, "three", lambda: group)

    def layer(product, x, residual, weight):
        y, total = norm(torch.ops.vllm.all_reduce(x, group_name="three"), residual, weight)
        return product(y), torch.ops.vllm.all_reduce(total, "three")

    done = case(layer, rows(), rows(), rows()[0], own_sums=True)
    assert done.after == ["all_reduce", "norm_matmul", "all_reduce"]
    assert "vllm.all_reduce" not in str(done.graph.graph)
    done = case(layer, rows(), rows(), rows()[0])
    assert done.after == ["norm_matmul"]
    assert str(done.graph.graph).count("vllm.all_reduce") == 2


def test_inboxes_are_asked_for_and_given_once_where_gpus_reach_each_other():
    from glq.vllm_integration.all_reduce import give_inboxes, wanted

    def config(additional, ubatching=False):
        return SimpleNamespace(additional_config=additional, parallel_config=SimpleNamespace(use_ubatching=ubatching))

    assert wanted(config({"glq_all_reduce": True}))
    assert not wanted(config({}))
    assert not wanted(config(None))
    assert not wanted(config({"glq_all_reduce": True}, ubatching=True))
    with pytest.raises(GlqError, match="unknown keys glq_allreduce"):
        wanted(config({"glq_allreduce": True, "other": 1}))
    for peers in (None, SimpleNamespace(disabled=True), SimpleNamespace(disabled=False, mnnvl_only=True)):
        group = SimpleNamespace(device_communicator=SimpleNamespace(ca_comm=peers))
        give_inboxes(group, torch.bfloat16)
        group.device_communicator = None  # which is not looked at again
        give_inboxes(group, torch.bfloat16)
        assert group.glq_inboxes is None


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("decompose", [True, False])
@pytest.mark.parametrize("swapped", [True, False])
def test_silu_becomes_part_of_its_product(dtype, decompose, swapped, case):
    def mlp(product, both):
        gate, up = silu(both[:, :COLUMNS]), both[:, COLUMNS:]
        return (product(up * gate if swapped else gate * up),)

    done = case(mlp, rows(dtype, 2 * COLUMNS), decompose=decompose)
    assert done.before == ["matmul"]
    assert done.after == ["silu_matmul"]
    assert not {"aten.mul.Tensor", "aten.silu.default"} & {str(node.target) for node in done.graph.graph.nodes}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_silu_by_a_sigmoid(dtype, case):
    """PyTorch's own decomposition."""

    def mlp(product, gate, up):
        wide = gate.float()
        return (product((wide * wide.sigmoid()).to(gate.dtype) * up),)

    assert case(mlp, rows(dtype), rows(dtype)).after == ["silu_matmul"]


def test_both_in_a_row(case):
    def layer(product, x, residual, weight):
        y, total = norm(x, residual, weight)
        y = product(y)
        z, total = norm(product(silu(torch.cat((y, y), 1)) * x), total[:, :64], weight[:64])
        return z, total

    assert case(layer, rows(), rows(), rows()[0]).after == ["norm_matmul", "silu_matmul", "fused_add_rms_norm"]


def left():
    """Functions of a product, x, residual and weight in which the pass finds nothing to do."""
    from vllm.ir.ops import rms_norm

    def two_products(product, x, residual, weight):
        y, total = norm(x, residual, weight)
        return product(y), product(y), total

    def norm_is_a_result(product, x, residual, weight):
        y, total = norm(x, residual, weight)
        return product(y), y, total

    def mlp_is_a_result(product, x, residual, _):
        y = silu(x) * residual
        return product(y), y

    return {
        "two products": two_products,
        "a norm that is read": norm_is_a_result,
        "an activation that is read": mlp_is_a_result,
        "part of a row": lambda product, x, residual, weight: (product(norm(x, residual, weight, 1e-5, 64)[0]),),
        "no weight": lambda product, x, residual, _: (product(norm(x, residual, None)[0]),),
        "made weight": lambda product, x, residual, weight: (product(norm(x, residual, 1 + weight)[0]),),
        "wider weight": lambda product, x, residual, weight: (product(norm(x, residual, weight.double())[0]),),
        "no sum": lambda product, x, _, weight: (product(rms_norm.torch_op(x, weight, 1e-5)),),
        "the sum": lambda product, x, residual, weight: (product(norm(x, residual, weight)[1]),),
        "gelu": lambda product, x, residual, _: (product(gelu(x) * residual),),
        "silu alone": lambda product, x, *_: (product(silu(x)),),
        "one up for all": lambda product, x, _, weight: (product(silu(x) * weight),),
        "a number": lambda product, x, *_: (product(silu(x) * 2),),
        "narrow silu": lambda product, x, residual, _: (product(silu(x.half()).float() * residual),),
        "another's sigmoid": lambda product, x, residual, _: (product(x * residual.sigmoid() * x),),
        "swish of 2": lambda product, x, residual, _: (product(x / (2 + x.neg().exp()) * residual),),
    }


NAMES = (
    "two products, a norm that is read, an activation that is read, part of a row, no weight, made weight, "
    "wider weight, no sum, the sum, gelu, silu alone, one up for all, a number, narrow silu, another's sigmoid, "
    "swish of 2"
)


@pytest.mark.parametrize("name", NAMES.split(", "))
def test_what_does_not_fit_is_left(name, case):
    done = case(left()[name], rows(), rows(), rows()[0])
    assert done.untouched
    assert done.before == done.after


FACTS = {
    "model_config": SimpleNamespace(use_mla=False, uses_mrope=False),
    "parallel_config": SimpleNamespace(use_ubatching=False),
}


def test_it_is_in_the_config_and_in_the_keys_of_caches():
    from vllm.compilation.passes.inductor_pass import CallableInductorPass
    from vllm.config import CompilationConfig, CompilationMode
    from vllm.platforms import current_platform

    from glq.vllm_integration.passes import FuseIntoProducts, install

    def installed(mode, **config):
        compilation = CompilationConfig(mode=mode, inductor_compile_config=config)
        key = compilation.compute_hash()
        vllm_config = SimpleNamespace(compilation_config=compilation, additional_config={}, **FACTS)
        install(vllm_config)
        once = compilation.compute_hash()
        install(vllm_config)
        assert compilation.compute_hash() == once
        return compilation.inductor_compile_config.get(current_platform.pass_key), once != key

    ours, changed = installed(CompilationMode.VLLM_COMPILE)
    assert isinstance(ours, FuseIntoProducts)
    assert changed
    assert ours.uuid() == FuseIntoProducts().uuid() != FuseIntoProducts(own_sums=True).uuid()
    assert installed(CompilationMode.NONE) == (None, False)
    theirs = CallableInductorPass(print, uuid="theirs")
    assert installed(CompilationMode.VLLM_COMPILE, **{current_platform.pass_key: theirs}) == (theirs, False)


@pytest.fixture(scope="module")
def checkpoint(text_file, tmp_path_factory):
    """q/k/v and gate/up are a product each: of one codec, and whole tiles."""
    folder = tmp_path_factory.mktemp("whole")
    model = make_model(folder / "model", hidden_size=128, intermediate_size=256)
    glq.quantize(model, folder / "out", glq.Settings(3, tokens=512, ctx=64), calibration=text_file, device="cpu")
    return folder / "out"


def test_a_compiled_engine_fuses_them_and_says_the_same(checkpoint, vllm, tmp_path, monkeypatch):  # noqa: F811
    """Once compiled, and once from vLLM's cache."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    options = {"packed": True, "count": True}
    eager = vllm(checkpoint, PROMPTS, **options)
    assert isinstance(eager, dict), eager[-6000:]
    steps = 8
    assert eager["calls"] == {"matmul": 8 * steps}
    files = []
    for _ in range(2):
        compiled = vllm(checkpoint, PROMPTS, **options, as_on_gpu=True, enforce_eager=False)
        assert isinstance(compiled, dict), compiled[-6000:]
        assert compiled["tokens"] == eager["tokens"]
        difference = torch.tensor(compiled["logprobs"]) - torch.tensor(eager["logprobs"])
        assert difference.abs().max() < 1e-4
        fused = {
            op: calls for op, calls in compiled["calls"].items() if op != "matmul"
        }  # which is inside of the others
        assert fused == {"norm_matmul": 3 * steps, "silu_matmul": 2 * steps, "rope_and_cache": 2 * steps}
        files.append({path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("rank_0_0/model")})
    assert len(files[0]) == 1
    assert files[1] == files[0]
