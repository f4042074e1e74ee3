"""What every command prints with: two consoles, errors in a line, bars for long work."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from glq.errors import GlqError

if TYPE_CHECKING:
    from glq.progress import Listener
    from glq.progress import Progress as Step

err = Console(stderr=True)
out = Console()


@contextmanager
def plain_errors() -> Iterator[None]:
    """A GlqError is the user's to mend: its text, exit code 2, no traceback."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # ours is the only one
    try:
        yield
    except GlqError as error:
        err.print(f"[red]glq:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def say(line: str) -> None:
    out.print(line, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def progress(log: Path | None = None) -> Iterator["Listener"]:
    """A bar for each stage of long work, on a terminal; and a file of JSON lines."""
    from glq.machine import peak_memory
    from glq.progress import JsonLog

    try:
        file = None if log is None else log.open("a", encoding="utf-8")
    except OSError as error:
        raise GlqError(f"cannot write {log}: {error.strerror}") from error
    with bar() as shown, file or nullcontext():
        tasks: dict[str, TaskID] = {}
        written = None if file is None else JsonLog(file)

        def show(step: "Step") -> None:
            if step.stage not in tasks:
                tasks[step.stage] = shown.add_task(step.stage, total=step.total)
            text = f"{step.stage} {step.note}  {peak_memory() / 1e9:.1f} GB"
            shown.update(tasks[step.stage], completed=step.done, total=step.total, description=text)
            if written is not None:
                written(step)

        yield show


def bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=err, disable=not err.is_terminal)
