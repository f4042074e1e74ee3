"""What a rank of vLLM keeps of a layer, without vLLM: shards, fused layers, what one product takes, what is refused."""

import pytest
import torch

from glq.config import ModuleConfig
from glq.errors import GlqError
from glq.packed import PackedLinear, packed_shapes
from glq.vllm_integration.parts import Loader, Rank, check_rows, cut, dequantize, multiply, runs


class Layer:
    """The tensors of a layer on a rank, loaded from packed matrices as vLLM would."""

    def __init__(self, matrices, rows, columns, rank, shards):
        self.modules = {f"m{i}": ModuleConfig(p.codec, p.in_features, p.out_features, p.block) for i, p in matrices}
        self.parts = cut(self.modules, rows, columns, rank)
        self.codes = torch.zeros(sum(part.nbytes for part in self.parts), dtype=torch.uint8)
        self.scale = torch.full((sum(part.rows for part in self.parts),), torch.nan, dtype=torch.float16)
        self.signs = torch.zeros(len(self.parts), -(-self.parts[0].columns // 8), dtype=torch.uint8)
        for (_, p), shard in zip(matrices, shards, strict=True):
            for name in ("codes", "scale", "signs"):
                param = torch.nn.Parameter(getattr(self, name), requires_grad=False)
                param.glq_missing = set(range(len(self.parts)))
                Loader(name, self.parts)(param, getattr(p, name), shard)
                assert len(param.glq_missing) == (0 if shard is None else len(self.parts) - 1)
        self.runs = runs(self.parts, self.signs)

    def __call__(self, x):
        return multiply(x, self.codes, self.scale, self.signs, self.runs)

    def weight(self):
        return dequantize(self.codes, self.scale, self.signs, self.parts, torch.float32)


def matrix(codec, rows, cols, block, seed=0):
    shapes = packed_shapes(codec, rows, cols)
    signs = torch.randint(0, 256, shapes["signs"], dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    codes = torch.randint(0, 256, shapes["codes"], dtype=torch.uint8)
    return PackedLinear(codec, rows, cols, block, codes, torch.rand(rows).add(0.5).half(), signs)


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


QKV = (("trellis-3", 256), ("trellis-3", 128), ("nested-4", 128))


def test_fused_parts_are_their_matrices():
    matrices = [matrix(codec, rows, 200, 200) for codec, rows in QKV]
    layer = Layer(list(enumerate(matrices)), [256, 128, 128], 200, Rank(0, 1), ["q", "k", "v"])
    weight = torch.cat([p.dequantize() for p in matrices])
    assert torch.equal(layer.weight(), weight)
    x = torch.randn(3, 200)
    assert difference(layer(x), x @ weight.T) < 1e-5
    assert [(run.codec, run.first_row, run.end_row) for run in layer.runs] == [
        ("trellis-3", 0, 384),
        ("nested-4", 384, 512),
    ]


@pytest.mark.parametrize(
    ("change", "count"),
    [({}, 1), ({"codec": "trellis-2"}, 2), ({"seed": 1}, 2), ({"block": 64}, 2)],
)
def test_one_product_takes_what_is_alike(change, count):
    first = {"codec": "trellis-3", "rows": 128, "cols": 128, "block": 128}
    matrices = [matrix(**first), matrix(**first | change)]
    layer = Layer(list(enumerate(matrices)), [128, 128], 128, Rank(0, 1), [0, 1])
    assert len(layer.runs) == count
    x = torch.randn(5, 128)
    assert difference(layer(x), x @ torch.cat([p.dequantize() for p in matrices]).T) < 1e-5


def test_ragged_rows_end_a_product():
    matrices = [matrix("trellis-3", 100, 128, 128), matrix("trellis-3", 30, 128, 128)]
    layer = Layer(list(enumerate(matrices)), [100, 30], 128, Rank(0, 1), [0, 1])
    assert len(layer.runs) == 2
    x = torch.randn(2, 128)
    assert difference(layer(x), x @ torch.cat([p.dequantize() for p in matrices]).T) < 1e-5


@pytest.mark.parametrize("codec", ["trellis-2", "nested-3"])
def test_column_shards_are_the_whole(codec):
    """q in two shards, k and v one head each on both ranks."""
    q, k, v = matrix(codec, 256, 128, 128), matrix(codec, 64, 128, 128), matrix(codec, 64, 128, 128)
    x = torch.randn(4, 128)
    for rank in range(2):
        layer = Layer(list(enumerate([q, k, v])), [128, 64, 64], 128, Rank(rank, 2), ["q", "k", "v"])
        rows = q.dequantize()[128 * rank : 128 * rank + 128]
        assert torch.equal(layer.weight(), torch.cat([rows, k.dequantize(), v.dequantize()]))
        assert difference(layer(x), x @ layer.weight().T) < 1e-5


@pytest.mark.parametrize("codec", ["trellis-2", "nested-3"])
def test_row_shards_add_up_to_the_whole(codec):
    p = matrix(codec, 100, 256, 64)
    x = torch.randn(4, 256)
    layers = [Layer([(0, p)], [100], 128, Rank(rank, 2), [None]) for rank in range(2)]
    assert (
        difference(sum(layer(part) for layer, part in zip(layers, x.split(128, 1), strict=True)), x @ p.dequantize().T)
        < 1e-5
    )


def test_a_matrix_that_was_fused_on_disk_is_cut_as_its_outputs():
    p = matrix("trellis-2", 512, 64, 64)
    whole = Layer([(0, p)], [256, 128, 128], 64, Rank(0, 1), [None])
    assert torch.equal(whole.weight(), p.dequantize())
    assert len(whole.runs) == 1
    w = p.dequantize()
    for rank in range(2):
        layer = Layer([(0, p)], [128, 64, 64], 64, Rank(rank, 2), [None])
        rows = [w[128 * rank :][:128], w[256 + 64 * rank :][:64], w[384 + 64 * rank :][:64]]
        assert torch.equal(layer.weight(), torch.cat(rows))


@pytest.mark.parametrize(
    ("module", "rows", "columns", "ranks", "match"),
    [
        (ModuleConfig("trellis-2", 128, 192, 128), [96], 128, 2, "cut tiles of 64 rows"),
        (ModuleConfig("trellis-2", 256, 64, 256), [64], 128, 2, "quantize with --tp 2"),
        (ModuleConfig("trellis-2", 192, 64, 96), [64], 96, 2, "quantize with --tp 2"),
        (ModuleConfig("trellis-2", 128, 128, 128), [100], 128, 1, "config.json is not this model's"),
        (ModuleConfig("trellis-2", 128, 128, 128), [128], 100, 1, "config.json is not this model's"),
        (ModuleConfig("trellis-2", 128, 128, 128), [64, 32], 128, 1, "cannot be cut to 1 ranks"),
    ],
)
def test_what_does_not_fit_is_refused(module, rows, columns, ranks, match):
    with pytest.raises(GlqError, match=match) as info:
        cut({"m": module}, rows, columns, Rank(0, ranks))
    assert "\n" not in str(info.value)


def test_outputs_that_no_matrix_has_are_refused():
    modules = dict.fromkeys("ab", ModuleConfig("trellis-2", 64, 64, 64))
    with pytest.raises(GlqError, match="fuses"):
        cut(modules, [64, 64, 64], 64, Rank(0, 1))
    param = torch.nn.Parameter(torch.zeros(128), requires_grad=False)
    with pytest.raises(GlqError, match="which glq does not know"):
        Loader("scale", cut(modules, [64, 64], 64, Rank(0, 1)))(param, torch.zeros(128), (0, 1))


def test_the_vocabulary_is_cut_between_tiles():
    check_rows("e", "trellis-2", 0, 302, 302)
    check_rows("e", "trellis-2", 64, 64, 128)
    with pytest.raises(GlqError, match="tiles of 64 rows"):
        check_rows("e", "trellis-2", 0, 32, 64)
    with pytest.raises(GlqError, match="tiles of 64 rows"):
        check_rows("e", "trellis-2", 32, 32, 64)
