"""A forward pass of a decoder block over one microbatch, which stops where groups of linear layers read their inputs.

Two ways to the same values: a pass that is paused keeps what it needs to go on, one that is repeated computes it again.
On a CPU products are what time goes to, and what waits can wait on disk; on a GPU products are quick and memory short.
"""

from collections.abc import Iterator
from functools import cache
from typing import NoReturn, Protocol

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from glq.discovery import Call, run_block
from glq.machine import tensor_cores
from glq.spill import held_by


class Pass(Protocol):
    """request: it will be asked for something soon. advance: the input of the next group, [tokens, in], and, if these
    are experts, the numbers of those that each token goes to, [tokens, k]. finish: the block's output. again: begin
    anew, the block has other weights now. held: what it keeps meanwhile."""

    def request(self) -> None: ...

    def advance(self) -> tuple[Tensor, ...]: ...

    def finish(self) -> Tensor: ...

    def again(self) -> None: ...

    def held(self) -> Iterator[Tensor]: ...


def begin(
    block: nn.Module,
    leaders: list[nn.Module],
    hidden: Tensor,
    call: Call,
    device: torch.device,
    changes: bool = True,
) -> Pass:
    """A pass of a block on this device over hidden [batch, ctx, width]; leaders: the first layer of each group.

    changes: the block's weights do between the last group's input and the output.
    """
    if device.type == "cpu":
        return _Paused(block, leaders, hidden, call)
    return _Repeated(block, leaders, hidden, call, device, changes)


class _Paused:
    """A coroutine (greenlet): it keeps its place while others run."""

    def __init__(self, block: nn.Module, leaders: list[nn.Module], hidden: Tensor, call: Call) -> None:
        self._what = block, hidden, call
        self._hooks = [module.register_forward_pre_hook(self._pause) for module in leaders]
        self._pass = greenlet(lambda: run_block(*self._what))

    def request(self) -> None: ...

    def advance(self) -> tuple[Tensor, ...]:
        args = self._pass.switch()
        if self._pass.dead:
            raise RuntimeError("the block ended before its last group of linear layers")
        return _flat(args)

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
        self,
        block: nn.Module,
        leaders: list[nn.Module],
        hidden: Tensor,
        call: Call,
        device: torch.device,
        changes: bool = True,
    ) -> None:
        self._block, self._hidden, self._call, self._device = block, hidden, call, device
        self._leaders = iter(leaders)
        self._last = None if changes or not leaders else leaders[-1]
        self._coming: tuple[Tensor, torch.cuda.Event] | None = None
        self._out: Tensor | None = None

    def request(self) -> None:
        """Have the input on its way from the host's memory while another one is worked on."""
        if self._hidden.device.type != self._device.type:
            coming = torch.empty_like(self._hidden, device=self._device)
            copies = _copies(self._device)
            copies.wait_stream(torch.cuda.current_stream(self._device))  # which may still use that memory
            with torch.cuda.stream(copies):
                coming.copy_(self._hidden, non_blocking=True)
            self._coming = coming, copies.record_event()

    def advance(self) -> tuple[Tensor, ...]:
        leader = next(self._leaders)
        if leader is self._last and (inputs := self._to_the_end(leader)):
            return inputs
        hook = leader.register_forward_pre_hook(_stop)
        try:
            self.finish()
        except _Reached as reached:
            return _flat(reached.inputs)
        finally:
            hook.remove()
        raise RuntimeError("the block ended before its last group of linear layers")

    def finish(self) -> Tensor:
        if self._out is not None:
            out, self._out = self._out, None
            return out
        with tensor_cores():
            return run_block(self._block, self._input(), self._call)

    def again(self) -> None: ...

    def held(self) -> Iterator[Tensor]:
        return iter(())

    def _to_the_end(self, leader: nn.Module) -> tuple[Tensor, ...] | None:
        """As advance, and the output is kept; nothing where the block changes what the group has read."""
        seen: list[tuple[tuple[Tensor, ...], list[int]]] = []

        def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append((args, [x._version for x in args]))

        hook = leader.register_forward_pre_hook(look)
        try:
            out = self.finish()
        finally:
            hook.remove()
        if len(seen) != 1 or [x._version for x in seen[0][0]] != seen[0][1]:
            return None
        self._out = out
        return _flat(seen[0][0])

    def _input(self) -> Tensor:
        if self._coming is None:
            return self._hidden.to(self._device, non_blocking=True)
        (hidden, there), self._coming = self._coming, None
        torch.cuda.current_stream(self._device).wait_event(there)
        return hidden


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream in which inputs come."""
    return torch.cuda.Stream(device)


def _flat(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return args[0].flatten(0, -2), *args[1:]


def _stop(module: nn.Module, args: tuple[Tensor, ...]) -> NoReturn:
    raise _Reached(args)
