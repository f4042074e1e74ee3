"""Pairs of a token and an expert, in the order of their experts; on the device, from shapes alone."""

import torch
from torch import Tensor


def sort_pairs(expert_of: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """expert_of [pairs] int → order [pairs] and ends [experts] int32: expert e has order[ends[e − 1] : ends[e]].

    Pairs of an expert keep their order; those whose expert is not among 0 … experts − 1 come last.
    """
    known = torch.where((expert_of >= 0) & (expert_of < experts), expert_of, experts)
    by_expert, order = torch.sort(known, stable=True)
    numbers = torch.arange(experts, device=expert_of.device, dtype=expert_of.dtype)
    return order.to(torch.int32), torch.searchsorted(by_expert, numbers, right=True, out_int32=True)


def segment_limit(pairs: int, experts: int, at_once: int) -> int:
    """How many groups of up to `at_once` pairs of one expert there may be."""
    return min(pairs, min(pairs, experts) + pairs // at_once)
