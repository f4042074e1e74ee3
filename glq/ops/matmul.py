"""y = x · Wᵀ for a packed W: one op above every implementation."""

import math
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import product

import torch
from torch import Tensor

from glq import nvrtc
from glq.codecs import get_codec
from glq.codecs.trellis import Trellis
from glq.custom_op import custom_op, register_fake
from glq.errors import GlqError
from glq.ops import cuda_batch, cuda_combine, cuda_decode, cuda_dequantize, cuda_prompt, cuda_rotate
from glq.ops.cuda_tiled import Parts
from glq.ops.cuda_tiled import Product as Tiled
from glq.ops.inputs import PLAIN, SILU, Input, plain
from glq.ops.matrix import Matrix
from glq.packed import PackedLinear, decode_matrix, packed_shapes, unpack_signs
from glq.rotation import rotate

# Measured on an H100: docs/benchmarks.md
_FEW = 16  # tokens up to which mma.sync is faster than Hopper's wgmma
DECODED = 64  # tokens up to which it is taken elsewhere; beyond, matrices are dequantized there
MANY = cuda_prompt.MOST + 1  # tokens from which cuBLAS with a dequantized matrix is faster than Hopper's kernels …
_MANY_IN_OWN_BASIS = 1792  # … and, beyond half of the rows, where that is made in the model's basis
# One for each kernel; what prompt.cu computes hangs on how the assembler takes it, for tables with signs and without.
_TRELLISES = {"trellis-2": (1, _FEW, _FEW + 1, 129, 257, MANY), "trellis-4": (129, 257)}
_LATTICE = (1, _FEW, _FEW + 1, DECODED + 1, 129, 257, MANY)
Product = Callable[[Input, Tensor, Tensor, Tensor], Tensor]  # of x and a PackedLinear's codes, scale and signs


@custom_op("matmul")
def matmul(x: Tensor, codes: Tensor, scale: Tensor, signs: Tensor, codec: str, out_features: int, block: int) -> Tensor:
    """x [..., in] fp32, fp16 or bf16 → y [..., out] in x's dtype; the rest as in PackedLinear."""
    if x.device.type != "cuda":
        return matmul_reference(x, codes, scale, signs, codec, out_features, block)
    if has_cuda_kernel(x, codec):
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        y = cuda_matmul(plain(rows), codes, scale, signs, codec, out_features, block)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], out_features)
    if not has_triton_kernel(x.device, codec):
        return matmul_reference(x, codes, scale, signs, codec, out_features, block)
    from glq.ops import triton_matmul

    return triton_matmul.matmul(x, codes, scale, signs, codec, out_features, block)


@register_fake("matmul")
def _(x: Tensor, codes: Tensor, scale: Tensor, signs: Tensor, codec: str, out_features: int, block: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def matmul_reference(
    x: Tensor, codes: Tensor, scale: Tensor, signs: Tensor, codec: str, out_features: int, block: int
) -> Tensor:
    """What the op means: rotate x in fp32, multiply by the decoded and scaled codes in x's dtype.

    The scales go into the weights, not onto the outputs: in fp16 a sum of unscaled weights would overflow.
    """
    in_features = x.shape[-1]
    weight = decode_matrix(codes, codec, out_features, in_features) * scale.float()[:, None]
    rotated = rotate(x.float(), unpack_signs(signs, in_features), block)
    return rotated.to(x.dtype) @ weight.to(x.dtype).T


def has_cuda_kernel(x: Tensor, codec: str) -> bool:
    """Whether the kernels of cuda_*.py take such an x, and work on this device for this codec."""
    takes = x.dtype in (torch.float16, torch.bfloat16) and x.numel() > 0
    return takes and _nvrtc_works(x.device, "trellis" if isinstance(get_codec(codec), Trellis) else codec)


@cache
def _nvrtc_works(device: torch.device, kind: str) -> bool:
    """Whether CUDA C++ compiles and loads here, and is right; where not, Triton has every kernel, too."""
    if not nvrtc.compiles_for(device):
        return False
    try:
        gpu = nvrtc.gpu(device)
        for codec, tokens in (_TRELLISES if kind == "trellis" else {kind: _LATTICE}).items():
            try_out(lambda x, weight: cuda_product(plain(x), weight, gpu), device, codec, tokens)
    except Exception as error:  # noqa: BLE001 (cuda-core, NVRTC and the driver have kinds of their own)
        warnings.warn(f"glq's CUDA kernels cannot be used for {kind} codes, Triton's are: {error}", stacklevel=2)
        return False
    return True


@cache
def has_triton_kernel(device: torch.device, codec: str) -> bool:
    """Whether Triton compiles the kernels for this codec here, and they compute what the reference does."""
    if find_spec("triton") is None:
        return False
    from glq.ops import triton_matmul

    def multiply(x: Tensor, w: PackedLinear) -> Tensor:
        return triton_matmul.matmul(x, w.codes, w.scale, w.signs, w.codec, w.out_features, w.block)

    try:
        try_out(multiply, device, codec, (1, triton_matmul.FEW + 1))
    except Exception as error:  # noqa: BLE001 (Triton and the driver have kinds of their own)
        warnings.warn(f"glq's Triton kernels cannot be used for {codec}, PyTorch's are: {error}", stacklevel=2)
        return False
    return True


def try_out(
    multiply: Callable[[Tensor, PackedLinear], Tensor], device: torch.device, codec: str, tokens: tuple[int, ...]
) -> None:
    """Compile, run and check small products in fp16. GlqError if one is wrong; what CUDA raises if there is none."""
    rows = 100
    for cols, count in product((256, 192), tokens):  # a power of two and a multiple of three: rotations differ
        codes = torch.arange(math.prod(shape := packed_shapes(codec, rows, cols)["codes"])).to(torch.uint8).view(shape)
        scale, signs = torch.linspace(0.5, 2, rows).half(), torch.full((cols // 8,), 0x5A, dtype=torch.uint8)
        x = torch.linspace(-1, 1, count * cols).view(count, cols)
        expected = matmul_reference(x, codes, scale, signs, codec, rows, cols)
        weight = PackedLinear(codec, rows, cols, cols, codes.to(device), scale.to(device), signs.to(device))
        compare(multiply(x.to(device).half(), weight), expected, count)


def compare(y: Tensor, expected: Tensor, tokens: int) -> None:
    """GlqError if what a kernel gave for so many tokens is not what PyTorch gives. In any types, on any devices."""
    y, expected = y.float().cpu(), expected.float().cpu()
    if not torch.allclose(y, expected, rtol=0.01, atol=0.01 * expected.abs().max().item()):
        raise GlqError(f"with {tokens} tokens it computes something else than PyTorch on this GPU")


def _most_tokens(codec: str, gpu: nvrtc.Launcher) -> int:
    """Of a product with codes as they are; with more the matrix is dequantized."""
    if gpu.arch != cuda_prompt.ARCH:
        return DECODED
    return max(cuda_batch.MOST, cuda_prompt.most_tokens(get_codec(codec)))


def makes_input(codec: str, tokens: int, block: int, gpu: nvrtc.Launcher, kind: int = SILU) -> bool:
    """Whether so many tokens of an x of that kind are made while they are rotated, at no launch of their own."""
    return cuda_rotate.makes(kind, block, tokens) and tokens <= _most_tokens(codec, gpu)


def cuda_matmul(
    x: Input, codes: Tensor, scale: Tensor, signs: Tensor, codec: str, out_features: int, block: int
) -> Tensor:
    """x [tokens, in] · Wᵀ by CUDA C++, on x's GPU; `in` is a multiple of 8 if x is not plain."""
    device, matrix = x.device, Matrix(codec, scale.dtype, out_features, x.shape[1], block)
    product = product_for(x.tokens, x.kind, x.dtype, matrix, device, nvrtc.gpu(device))
    return product(x, codes, scale, signs)


def cuda_product(x: Input, weight: PackedLinear, gpu: nvrtc.Launcher) -> Tensor:
    """The same, by any launcher."""
    matrix = Matrix(weight.codec, weight.scale.dtype, weight.out_features, weight.in_features, weight.block)
    return product_for(x.tokens, x.kind, x.dtype, matrix, x.device, gpu)(x, weight.codes, weight.scale, weight.signs)


@lru_cache(1 << 14)
def product_for(
    tokens: int, kind: int, dtype: torch.dtype, matrix: Matrix, device: torch.device, gpu: nvrtc.Launcher
) -> Product:
    """By the kernel that is fastest for so many tokens. Kept: a model's steps make hundreds of products, all alike."""
    most = _most_tokens(matrix.codec, gpu)
    if cuda_dequantize.in_own_basis(matrix.codec, matrix.rows, matrix.block, tokens):
        most = min(most, _many_in_own_basis(matrix.rows) - 1)
    dequantized = tokens > most
    if kind != PLAIN and (dequantized or not makes_input(matrix.codec, tokens, matrix.block, gpu, kind)):
        multiply = product_for(tokens, PLAIN, dtype, matrix, device, gpu)
        return lambda x, *weight: multiply(plain(cuda_combine.combine(x, gpu)), *weight)
    if dequantized:
        return lambda x, codes, scale, signs: cuda_dequantize.matmul(
            x.first, PackedLinear(matrix.codec, matrix.rows, matrix.cols, matrix.block, codes, scale, signs), gpu
        )
    if gpu.arch != cuda_prompt.ARCH or tokens <= _FEW:
        size = cuda_decode.max_tokens(gpu.arch)
        if tokens > size:
            each = [
                product_for(min(size, tokens - i), kind, dtype, matrix, device, gpu) for i in range(0, tokens, size)
            ]
            return lambda x, *weight: torch.cat([f(part, *weight) for f, part in zip(each, x.split(size), strict=True)])
        return cuda_decode.make_product(
            cuda_decode.make_plan(tokens, kind, dtype, matrix, gpu), kind, matrix, device, gpu
        )
    size = cuda_prompt.tokens_at_once(tokens, kind, matrix, gpu.multiprocessors)
    counts = [min(size, tokens - i) for i in range(0, tokens, size)]
    parts = tuple(_on_hopper(n, kind, dtype, matrix, device, gpu, beside=i > 0) for i, n in enumerate(counts))
    return parts[0] if len(parts) == 1 else Parts(parts)


def _on_hopper(
    tokens: int,
    kind: int,
    dtype: torch.dtype,
    matrix: Matrix,
    device: torch.device,
    gpu: nvrtc.Launcher,
    beside: bool,
) -> Tiled:
    given = (tokens, kind, matrix, device, gpu)
    batch = cuda_batch.make_plan(tokens, dtype, matrix, gpu.multiprocessors)
    if batch:
        product = cuda_batch.make_product(batch, *given)
    else:
        product = cuda_prompt.make_product(cuda_prompt.make_plan(tokens, dtype, matrix, gpu.multiprocessors), *given)
    return product.beside(kind, dtype, matrix) if beside else product


def _many_in_own_basis(out_features: int) -> int:
    return max(_MANY_IN_OWN_BASIS, out_features // 2 + 1)


def kernel_tokens(codec: str, out_features: int) -> list[int]:
    """Numbers of tokens that between them take every kernel which cuda_product has for a matrix of so many rows."""
    few = {*range(1, 9), *range(9, DECODED, 8)}  # up to 8 tokens differ in shared memory, then each 8 are a kernel
    many = cuda_prompt.most_tokens(get_codec(codec)) + 1
    own_basis = max(cuda_dequantize.own_basis_tokens(out_features), min(many, _many_in_own_basis(out_features)))
    return sorted(few | {DECODED + 1, cuda_batch.MOST + 1, cuda_prompt.FEW + 1, many, own_basis})
