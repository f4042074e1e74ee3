"""Whether a program may take its step's place: what is found out, and what is no mistake."""

import re

import pytest
import torch
from emulator import Emulator

from glq.step.program import Program
from glq.step.proof import difference, prove
from glq.step.record import record


def test_what_pytorch_does_not_see_is_found_out():
    """A kernel of somebody else, here numpy, and a number that went through Python."""

    def unseen(x, y):
        z = x * 2
        z.numpy()[:] += 1
        return z + y

    for function in (unseen, lambda x, y: x + float(y[0])):
        inputs = [torch.randn(3), torch.randn(3)]
        _, recording = record(lambda f=function, i=inputs: f(*i))
        program = Program(recording, Emulator(1))
        for x in inputs:
            x.normal_()
        proof = prove(program, lambda f=function, i=inputs: f(*i))
        assert torch.equal(proof.output, function(*inputs))
        assert not proof.right


@pytest.mark.parametrize(("error", "right"), [(5e-7, True), (1e-3, False)])
def test_rounding_that_differs_each_time_is_no_mistake(error, right):
    """Of a kernel that PyTorch does not see; what is wrong by more is found. The remark says how much and where."""

    def function(x, count, w, rounding):
        count.add_(1)
        product = x @ w
        product.numpy()[:] *= 1 + rounding.pop()
        return product * 2

    rounding = [0.0] * 8
    inputs = [torch.randn(3, 4), torch.tensor(0), torch.randn(4, 5), rounding]
    _, recording = record(lambda: function(*inputs))
    program = Program(recording, Emulator(1))
    inputs[0].normal_()
    rounding[:] = [error] * 8
    proof = prove(program, lambda: function(*inputs))
    assert inputs[1] == 2
    assert proof.right == right
    assert torch.equal(proof.output, (inputs[0] @ inputs[2] * (1 + error)) * 2)
    assert "not the same" in proof.remark
    assert re.search(r"first at (mm|mul)", proof.remark)


def test_a_model_may_differ_from_itself():
    x, errors = torch.randn(64), [0.0, 0.01, 0.0, 0.02]

    def function():
        y = x * 1
        y.numpy()[:] *= 1 + errors[0]
        errors.append(errors.pop(0))
        return y

    _, recording = record(function)
    proof = prove(Program(recording, Emulator(1)), function)  # 0.01, then 0
    assert proof.right
    assert "which is 0.0099 from" in proof.remark


def test_recordings_are_compared():
    def calls(function, *inputs):
        return record(lambda: function(*inputs))[1]

    x, y = torch.randn(4), torch.randn(4)
    assert difference(calls(lambda: x.sin() + y), calls(lambda: x.sin() + y)) == ""
    assert difference(calls(lambda: x + torch.ones(4)), calls(lambda: x + torch.ones(4))) == ""
    for first, second in (
        (lambda: x.sin() + y, lambda: x.cos() + y),
        (lambda: x.sin() + y, lambda: y.sin() + x),
        (lambda: x + 2, lambda: x + 3),
        (lambda: x + 2, lambda: x + 2.0),
        (lambda: x + torch.ones(4), lambda: x + torch.zeros(4)),
        (lambda: x[1:] * 2, lambda: x[:3] * 2),
        (lambda: (x.sin(), x.cos())[0].exp(), lambda: (x.sin(), x.cos())[1].exp()),
        (lambda: x.sin(), lambda: x.sin().sin()),
    ):
        assert difference(calls(first), calls(second))
