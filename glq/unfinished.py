"""The folder in which a checkpoint is made, and the journal that lets the same command go on after it was stopped.

It lies beside the checkpoint, as `.NAME.partial`, and one process has it at a time. What the journal names is on the
disk before the journal is, and the journal is replaced in one step: whenever the power goes, what it says holds.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glq.errors import GlqError, ResumableError
from glq.shards import sync_folder, write_json

JOURNAL = "journal.json"
LOCK = "lock"


class UnfinishedFolder:
    """`.NAME.partial`, locked. GlqError if another process has it, or if it holds what differs from `record`.

    record: what the bytes depend on, JSON; None for work that does not go on. restart: begin anew in any case.
    `journal` is what was written last, None where nothing is done yet.
    """

    def __init__(self, out: Path, record: dict[str, Any] | None, restart: bool = False) -> None:
        self._record = None if record is None else json.loads(json.dumps(record))
        self._out = out
        self.path = folder_of(out)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path / LOCK, out)
        except OSError as error:
            raise GlqError(f"cannot write to {out.absolute().parent}: {error.strerror}") from error
        try:
            self.journal = None if restart else self._matching()
            if self.journal is None:
                self.clear()
        except BaseException:
            self._unlock()
            raise

    def write(self, journal: dict[str, Any]) -> None:
        """Replace the journal. Everything that it names must be on the disk."""
        sync_folder(self.path)
        write_json({"record": self._record, **journal}, self.path / JOURNAL)
        sync_folder(self.path)
        self.journal = journal

    def clear(self) -> None:
        """Remove everything but the lock, the journal first: the rest means nothing without it."""
        (self.path / JOURNAL).unlink(missing_ok=True)
        self.journal = None
        for file in self.path.iterdir():
            if file.is_dir():
                shutil.rmtree(file)
            elif file.name != LOCK:
                file.unlink()

    def close(self, keep: bool) -> None:
        """Let others have the folder, or remove it."""
        if not keep:
            self.clear()
            (self.path / LOCK).unlink()
            self.path.rmdir()
        self._unlock()

    def _matching(self) -> dict[str, Any] | None:
        try:
            journal = json.loads((self.path / JOURNAL).read_text(encoding="utf-8"))
            record = journal.pop("record")
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, AttributeError) as error:
            raise GlqError(f"{self.path} is not what glq left there: remove it, or --restart") from error
        if self._record is None:
            raise GlqError(f"{self.path} holds unfinished work of `glq quantize`: finish or remove that first")
        if changes := list(_changes(record, self._record)):
            more = f", and {len(changes) - 3} more" if len(changes) > 3 else ""
            raise GlqError(
                f"{self.path} holds unfinished work that differs from this: {'; '.join(changes[:3])}{more}. Give what "
                "it was begun with to go on, or --restart to begin anew"
            )
        return dict(journal)

    def _unlock(self) -> None:
        os.close(self._lock)


def folder_of(out: Path) -> Path:
    return out.absolute().parent / f".{out.name}.partial"


def _changes(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """What differs, as `name was …, is …`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _changes(old.get(key), new.get(key), f"{name} {key}".strip())
    elif old != new:
        yield f"{name}: begun with {_short(old)}, now {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _locked(file: Path, out: Path) -> int:
    """The lock file, opened and locked until it is closed, or the process ends."""
    opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        import fcntl

        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = not file.exists() or file.stat().st_ino != os.fstat(opened).st_ino
    except ImportError:  # Windows: nothing keeps two processes apart
        return opened
    except BlockingIOError:
        other = os.read(opened, 20).decode(errors="replace").strip()
        os.close(opened)
        raise GlqError(
            f"process {other or '?'} writes to {out} already: wait for it, or name another directory"
        ) from None
    if gone:
        os.close(opened)
        raise ResumableError(f"another process finished {out} at this moment: start again")
    os.truncate(opened, 0)
    os.write(opened, f"{os.getpid()}\n".encode())
    return opened
