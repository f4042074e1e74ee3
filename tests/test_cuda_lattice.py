"""E8 and nested codes in the CUDA kernels that trellis codes have (test_cuda_matmul.py): what only they have."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from cubins import TRELLISES, check_pipeline
from emulator import Emulator
from test_cuda_matmul import PROMPT_SHAPES, check, check_batch, emulated, problem

from glq.codecs import CODECS
from glq.ops import cuda_batch, cuda_dequantize, cuda_prompt
from glq.ops.matrix import Matrix

LATTICES = [name for name in CODECS if name not in TRELLISES]


@emulated
@pytest.mark.parametrize("name", LATTICES)
def test_every_number_of_tiles_of_a_lattice(name):
    """Of which two, one below the other, are a tile of the kernel; the last may be alone."""
    for rows in (1, 32, 33, 64, 97, 300):
        check(name, 9, rows, 150, 75, Emulator(2), torch.bfloat16)


@emulated
@pytest.mark.parametrize("name", LATTICES)
def test_lattices_decode_to_the_codec_s_values(name):
    """Rounded three times at most, whatever the word."""
    _, weight = problem(name, 1, 512, 1024, 64, torch.float16)
    weight = replace(weight, scale=torch.ones_like(weight.scale))
    found, expected = cuda_dequantize.decode_scaled(weight, torch.float16, Emulator(4)).float(), weight.decode()
    assert ((found - expected).abs() <= 1.5 / 1024 * expected.abs().clamp_min(0.25)).all()


LATTICE_SHAPES = [
    cuda_batch.Shape(32, 2, 1, 4),
    cuda_batch.Shape(32, 2, 2, 2),
    cuda_batch.Shape(64, 2, 1, 4),
    cuda_batch.Shape(64, 2, 2, 2),
    cuda_batch.Shape(128, 2, 1, 2),
    cuda_batch.Shape(128, 2, 2, 1),
]


@emulated
@pytest.mark.parametrize(("shape", "parts"), list(zip(LATTICE_SHAPES, [1, 2, 3, 1, 4, 2], strict=True)))
def test_batch_of_every_shape_of_lattices(shape, parts):
    check_batch("nested-3", shape.tokens + 9, 330, 328, shape, parts)
    check_batch("e8-3.5", shape.tokens - 5, 97, 328, shape, parts)


def test_batches_of_lattices_have_plans_for_every_matrix():
    for name, tokens, rows, cols in product(LATTICES, (17, 33, 65, 128), (1, 130, 4096, 28672), (64, 200, 14336)):
        plan = cuda_batch.make_plan(tokens, torch.float16, Matrix(name, torch.float16, rows, cols, 0), 132)
        assert plan.shape in LATTICE_SHAPES
        assert plan.shared <= 227 * 1024
        assert 1 <= plan.parts <= min(8, -(-cols // 64))


@pytest.mark.parametrize(("name", "shape"), [("e8-3.5", LATTICE_SHAPES[-1]), ("nested-3.5", LATTICE_SHAPES[2])])
def test_products_of_warpgroups_keep_their_pipeline(name, shape):
    """ptxas says so where it does not."""
    check_pipeline(cuda_batch.fill(CODECS[name], torch.float16, torch.float16, shape))


@pytest.mark.parametrize("shape", PROMPT_SHAPES)
def test_many_tokens_of_a_code_in_two_stages_keep_theirs(shape):
    check_pipeline(cuda_prompt.fill(CODECS["e8-3.5"], torch.bfloat16, torch.float16, shape))
