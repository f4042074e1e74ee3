"""Passes of a block that begin anew for each group: what they give, and how often the block runs for it."""

import pytest
import torch
from torch import nn

from glq.discovery import Call
from glq.passes import _Paused, _Repeated


class Block(nn.Module):
    """Two groups; it may change what the second has read."""

    def __init__(self, changes: bool) -> None:
        super().__init__()
        self.first, self.second, self.changes, self.runs = nn.Linear(8, 8), nn.Linear(8, 8), changes, 0

    def forward(self, hidden, scale):
        self.runs += 1
        inside = self.first(hidden).relu()
        out = self.second(inside)
        if self.changes:
            inside.view(-1).mul_(3)
        return out + inside * scale


@pytest.mark.parametrize(
    ("kind", "options", "in_place", "runs"),
    [
        (_Paused, (), False, 1),
        (_Repeated, (torch.device("cpu"),), False, 3),
        (_Repeated, (torch.device("cpu"), False), False, 2),
        (_Repeated, (torch.device("cpu"), False), True, 4),
    ],
    ids=["waits", "begins anew", "and its weights stay", "and it changes what a group has read"],
)
def test_inputs_and_output(kind, options, in_place, runs):
    block, hidden = Block(in_place), torch.randn(2, 3, 8)
    with torch.no_grad():
        inside = block.first(hidden).relu()
        expected = block(hidden, 0.5)
        block.runs = 0
        one = kind(block, [block.first, block.second], hidden, Call((0.5,), {}), *options)
        one.request()
        assert torch.equal(one.advance()[0], hidden.flatten(0, 1))
        assert torch.equal(one.advance()[0], inside.flatten(0, 1))
        assert torch.equal(one.finish(), expected)
    assert block.runs == runs


def test_weights_that_change_count_in_the_output():
    """As those of the quantized model do, which are rounded when the last group was read."""
    block, hidden = Block(False), torch.randn(2, 3, 8)
    with torch.no_grad():
        one = _Repeated(block, [block.first, block.second], hidden, Call((0.5,), {}), torch.device("cpu"))
        one.advance(), one.advance()
        block.second.weight.zero_()
        assert torch.equal(one.finish(), block(hidden, 0.5))
