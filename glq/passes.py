"""A forward pass of a decoder block over one microbatch, which stops where groups of linear layers read their inputs.

Two ways to the same values: a pass that is paused keeps what it needs to go on, one that is repeated computes it again.
On a CPU products are what time goes to, and what waits can wait on disk; on a GPU products are quick and memory short.
"""

from collections.abc import Iterator
from typing import NoReturn, Protocol

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from glq.discovery import Call, run_block
from glq.machine import tensor_cores
from glq.spill import held_by


class Pass(Protocol):
    """advance: the input of the next group, [tokens, in], and, if these are experts, the numbers of those that each
    token goes to, [tokens, k]. finish: the block's output. again: begin anew, the block has other weights now. held:
    what it keeps meanwhile."""

    def advance(self) -> tuple[Tensor, ...]: ...

    def finish(self) -> Tensor: ...

    def again(self) -> None: ...

    def held(self) -> Iterator[Tensor]: ...


def begin(block: nn.Module, leaders: list[nn.Module], hidden: Tensor, call: Call, device: torch.device) -> Pass:
    """A pass of a block on this device over hidden [batch, ctx, width]; leaders: the first layer of each group."""
    if device.type == "cpu":
        return _Paused(block, leaders, hidden, call)
    return _Repeated(block, leaders, hidden, call, device)


class _Paused:
    """A coroutine (greenlet): it keeps its place while others run."""

    def __init__(self, block: nn.Module, leaders: list[nn.Module], hidden: Tensor, call: Call) -> None:
        self._what = block, hidden, call
        self._hooks = [module.register_forward_pre_hook(self._pause) for module in leaders]
        self._pass = greenlet(lambda: run_block(*self._what))

    def advance(self) -> tuple[Tensor, ...]:
        args = self._pass.switch()
        if self._pass.dead:
            raise RuntimeError("the block ended before its last group of linear layers")
        return args[0].flatten(0, -2), *args[1:]

    def finish(self) -> Tensor:
        out = self._pass.switch()
        if not self._pass.dead:
            raise RuntimeError("the block read a group of linear layers twice")
        for hook in self._hooks:
            hook.remove()
        return out

    def again(self) -> None:
        self.finish()
        self._pass = greenlet(lambda: run_block(*self._what))

    def held(self) -> Iterator[Tensor]:
        return held_by(None if self._pass.dead else self._pass.gr_frame)

    def _pause(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if getcurrent() is self._pass:
            self._pass.parent.switch(args)


class _Reached(Exception):  # noqa: N818 - it is how a pass ends early, not an error
    def __init__(self, args: tuple[Tensor, ...]) -> None:
        self.inputs = args


class _Repeated:
    """Runs from the block's input each time, which may wait in the host's memory; keeps nothing."""

    def __init__(
        self, block: nn.Module, leaders: list[nn.Module], hidden: Tensor, call: Call, device: torch.device
    ) -> None:
        self._block, self._hidden, self._call, self._device = block, hidden, call, device
        self._leaders = iter(leaders)

    def advance(self) -> tuple[Tensor, ...]:
        hook = next(self._leaders).register_forward_pre_hook(_stop)
        try:
            self.finish()
        except _Reached as reached:
            return reached.inputs[0].flatten(0, -2), *reached.inputs[1:]
        finally:
            hook.remove()
        raise RuntimeError("the block ended before its last group of linear layers")

    def finish(self) -> Tensor:
        with tensor_cores():
            return run_block(self._block, self._hidden.to(self._device, non_blocking=True), self._call)

    def again(self) -> None: ...

    def held(self) -> Iterator[Tensor]:
        return iter(())


def _stop(module: nn.Module, args: tuple[Tensor, ...]) -> NoReturn:
    raise _Reached(args)
