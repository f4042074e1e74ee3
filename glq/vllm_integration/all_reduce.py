"""vLLM's sums over tensor-parallel ranks, by ops/all_reduce.cu where they are small and the GPUs reach each other.

    vllm serve MODEL --tensor-parallel-size 2 --additional-config '{"glq_all_reduce": true}'

It starts while the product ahead ends, the product behind it while it runs, and ranks need no barriers. Without the
option, and without torch.compile, vLLM's own sums stay.
"""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed import parallel_state
from vllm.distributed.device_communicators.cuda_wrapper import CudaRTLibrary

from glq import nvrtc
from glq.custom_op import custom_op, register_fake
from glq.ops import cuda_all_reduce
from glq.ops.cuda_all_reduce import Inboxes, capacity, inbox_bytes, make_inboxes, takes
from glq.vllm_integration.options import options_of

_CALLS = 4  # of the first check: one more than an inbox has turns


@custom_op("all_reduce")
def all_reduce(tensor: Tensor, group_name: str) -> Tensor:
    """As vllm::all_reduce, which it is where the group has no inboxes, and for large tensors."""
    inboxes = getattr(parallel_state._groups[group_name](), "glq_inboxes", None)
    if inboxes is None or not takes(tensor, inboxes.ranks):
        return torch.ops.vllm.all_reduce(tensor, group_name)
    return cuda_all_reduce.all_reduce(tensor, inboxes, nvrtc.gpu(tensor.device))


@register_fake("all_reduce")
def _(tensor: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(tensor)


def wanted(config: Any) -> bool:
    """Whether a VllmConfig asks for them. Two batches at a time would take each other's sums: not with these."""
    return bool(options_of(config).get("glq_all_reduce")) and not config.parallel_config.use_ubatching


def give_inboxes(group: Any, dtype: torch.dtype) -> None:
    """Once for a group of vLLM's, by all its ranks at the same point: memory to send each other what is added up.

    None where vLLM has no sums of its own on the GPUs either: it looks whether they reach each other.
    """
    if not hasattr(group, "glq_inboxes"):
        group.glq_inboxes = _open(group, dtype)


def _open(group: Any, dtype: torch.dtype) -> Inboxes | None:
    peers = getattr(group.device_communicator, "ca_comm", None)
    if peers is None or peers.disabled or peers.mnnvl_only:
        return None
    try:  # before any rank waits for what another one sends
        ready = nvrtc.compiles_for(group.device)
        if ready:
            cuda_all_reduce.source(dtype, group.world_size).cubin(f"sm_{nvrtc.gpu(group.device).arch}")
    except Exception as error:  # noqa: BLE001 (NVRTC and the driver have kinds of their own)
        warnings.warn(f"glq's sums over ranks cannot be compiled, vLLM's are taken: {error}", stacklevel=2)
        ready = False
    if not _all(group, ready):
        return None
    size = inbox_bytes(group.world_size)
    addresses = peers.create_shared_buffer(size, group=group.cpu_group)
    CudaRTLibrary().cudaMemset(addresses[group.rank_in_group], 0xFF, size)
    torch.cuda.synchronize(group.device)
    dist.barrier(group.cpu_group)
    inboxes = make_inboxes(group.rank_in_group, addresses, group.device)
    if _all(group, _adds_up(inboxes, dtype, group.device)):
        return inboxes
    warnings.warn("glq's sums over ranks are wrong on these GPUs, vLLM's are taken", stacklevel=2)
    return None


def _adds_up(inboxes: Inboxes, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether sums of all that fits, and of a little, are right in each turn."""
    good, most = True, capacity(inboxes.ranks) // dtype.itemsize
    for call in range(2 * _CALLS):
        pattern = (torch.arange(8 if call % 2 else most, device=device) + call) % 4
        y = cuda_all_reduce.all_reduce((pattern * (inboxes.rank + 1)).to(dtype), inboxes, nvrtc.gpu(device))
        good &= torch.equal(y, (pattern * (inboxes.ranks * (inboxes.ranks + 1) // 2)).to(dtype))
    return good


def _all(group: Any, mine: bool) -> bool:
    """Whether it holds on all ranks."""
    found = torch.tensor(int(mine))
    dist.all_reduce(found, op=dist.ReduceOp.MIN, group=group.cpu_group)
    return bool(found.item())
