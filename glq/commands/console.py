"""What every command prints with: two consoles, errors in a line, bars for long work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from glq.errors import GlqError

if TYPE_CHECKING:
    from glq.progress import Listener
    from glq.progress import Progress as Step

err = Console(stderr=True)
out = Console()


@contextmanager
def plain_errors(check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """A GlqError is the user's to mend: its text, exit code 2, no traceback. check: done before long imports."""
    try:
        check()
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # ours is the only one
        yield
    except GlqError as error:
        err.print(f"[red]glq:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def say(line: str) -> None:
    out.print(line, highlight=False, soft_wrap=True, markup=False)


def tell(line: str) -> None:
    """Beside the results."""
    err.print(line, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def progress(log: Path | None = None, goes_on: Callable[[], bool] = lambda: False) -> Iterator["Listener"]:
    """A bar for each stage of long work, on a terminal; and a file of JSON lines.

    Ctrl-C ends the command with a line. goes_on: whether the same command goes on then with what was done.
    """
    from glq.machine import peak_memory
    from glq.progress import JsonLog

    try:
        file = None if log is None else log.open("a", encoding="utf-8")
    except OSError as error:
        raise GlqError(f"cannot write {log}: {error.strerror}") from error
    with bar() as shown, file or nullcontext():
        tasks: dict[str, TaskID] = {}
        written = None if file is None else JsonLog(file)
        plain = None if err.is_terminal else Plain()
        place = "before any of the work was done"

        def show(step: "Step") -> None:
            nonlocal place
            place = f"{step.stage}, {step.done} of {step.total}"
            if step.stage not in tasks:
                if step.stage == "rounding" and step.done > 1:
                    tell(f"going on after {step.done - 1} of {step.total} that a run before did")
                tasks[step.stage] = shown.add_task(step.stage, total=step.total, first=step.done)
            text = f"{step.stage} {step.note}  {peak_memory() / 1e9:.1f} GB"
            shown.update(tasks[step.stage], completed=step.done, total=step.total, description=text)
            if plain is not None:
                plain.update(step.stage, step.done, step.total)
            if written is not None:
                written(step)

        try:
            yield show
        except KeyboardInterrupt:
            tell(
                f"stopped: {place}. "
                + ("The same command goes on at the last saved block" if goes_on() else "Nothing of it is kept")
            )
            raise typer.Exit(130) from None


def bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), _Remaining(), console=err, disable=not err.is_terminal)


class Plain:
    """Progress where there is no terminal, in a log: a line a minute, or at every tenth if that comes first."""

    EVERY, LEAST = 60.0, 10.0  # seconds between lines, at most and at least

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._stage, self._start, self._first, self._said, self._tenth = "", 0.0, 0, 0.0, 0

    def update(self, stage: str, done: int, total: int) -> None:
        now = self._clock()
        if stage != self._stage:
            self._stage, self._start, self._first, self._said, self._tenth = stage, now, done, now, 10 * done // total
        since, tenth = now - self._said, 10 * done // total
        if since >= self.EVERY or (tenth > self._tenth and since >= self.LEAST):
            self._said, self._tenth = now, tenth
            left = time_left(now - self._start, done - self._first, total - done)
            tell(f"{stage} {done}/{total}, {left} left")


def time_left(elapsed: float, done: int, to_do: int) -> str:
    """By the mean pace so far, as 1:02:03. rich's own looks at the last half minute, in which a slow step has none."""
    if not done:
        return "-:--:--"
    minutes, seconds = divmod(round(elapsed / done * to_do), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class _Remaining(ProgressColumn):
    def render(self, task: Task) -> Text:
        first = task.fields.get("first", 0)  # done by a run before, or when the bar began
        done, to_do = int(task.completed - first), int((task.total or 0) - task.completed)
        return Text(time_left(task.elapsed or 0.0, done, to_do), style="progress.remaining")
