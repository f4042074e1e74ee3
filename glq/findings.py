"""What could go wrong unseen: said of each layer by name, and handled by a rule (docs/robustness.md)."""

import torch
from torch import Tensor

from glq.moments import Moments

MOST_FP16 = 65504.0
WORSE = 1.05  # times what plain rounding is expected to lose: more than chance


def of_input(moments: Moments) -> list[str]:
    """Of what a group of layers reads."""
    found, width = [], len(moments.hessian)
    dead = int((moments.hessian.diagonal() == 0).sum())
    if dead == width:
        found.append("reads nothing but zeros: rounded as if all channels counted the same")
    elif dead:
        found.append(f"{dead} of {width} channels it reads are always zero: their weights are rounded, but not fitted")
    if moments.largest > MOST_FP16:
        found.append(f"reads values up to {moments.largest:.3g}, beyond fp16: run the model in bf16 or fp32")
    return found


def of_damping(asked: float, taken: float) -> list[str]:
    """Of a Hessian whose factorization failed until its damping was raised."""
    return [f"ill-conditioned Hessian: damped by {taken:g} instead of {asked:g}"] if taken > asked else []


def of_states(states: list[Tensor]) -> list[str]:
    """Of what a block gives."""
    ends = [torch.aminmax(state) for state in states]
    found = [max(-low.item(), high.item()) for low, high in ends]
    if large := [value for value in found if not value <= MOST_FP16]:  # NaN, too
        return [f"gives values up to {max(large):.3g}, beyond fp16: run the model in bf16 or fp32"]
    return []


def expected_loss(target: Tensor, hessian: Tensor, mse: float) -> float:
    """The energy that plain rounding by a codec of this distortion takes from the outputs on average."""
    return (mse * target.square().mean(1).sum() * hessian.diagonal().sum()).item()
