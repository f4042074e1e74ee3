"""Checkpoints in the making: written piece by piece beside where they will be, and moved there when they are whole.

A thread writes while the work goes on, one file after the other in the order in which they were given, so that the
journal says nothing that is not on the disk.
"""

import copy
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from glq.arguments import refuse_existing
from glq.background import Background
from glq.checkpoint import DIGESTS, config_digest, read_config
from glq.errors import GlqError, ResumableError
from glq.files import INDEX, SINGLE, read_json
from glq.shards import join, save, sync_folder
from glq.unfinished import UnfinishedFolder

SHARD_BYTES = 2**30
_WAITING = 2**28  # bytes of parts that may wait until they are written
_BETWEEN = (
    10  # times as long as a save takes, from one to the next: at most a tenth of the time is spent writing states
)
_NOTHING: dict[str, Any] = {"parts": 0, "shards": [], "states": None, "saved": None}


class CheckpointWriter:
    """Writes a checkpoint beside `out`, and moves it there when everything is on disk.

    Used as a context manager. With a `record`, JSON of all that the bytes depend on, work that was saved is kept when
    something stops it, and a writer with the same record has it again: `saved` is what `save` was given last, None at
    the beginning. Without one, or if nothing was saved, or if the work itself is at fault (a GlqError that is not
    ResumableError), whatever is raised inside leaves no trace. GlqError if `out` exists and is not an empty directory,
    cannot be written, or is written by another process, and if other work was begun there. What cannot be written is
    raised by what is called next, `commit` at the latest.
    """

    def __init__(self, out: Path, record: dict[str, Any] | None = None, restart: bool = False) -> None:
        self.out = Path(out)
        refuse_existing(self.out)
        self.saved: dict[str, Any] | None = None
        self._states: int | None = None
        self._next_save = 0.0
        self._unsaved: dict[int, Event] = {}  # address of a state that is being saved → that it is in the file
        self._behind = Background(_WAITING)
        self._work = UnfinishedFolder(self.out, record, restart)
        self.folder = self._work.path
        try:
            refuse_existing(self.out)  # another process may have had the lock until now
            with self._on_disk():
                self._resume(self._work.journal or _NOTHING)
        except BaseException:
            self._work.close(keep=self._work.journal is not None)
            raise

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        at_fault = kind is not None and issubclass(kind, GlqError) and not issubclass(kind, ResumableError)
        try:
            self._behind.close(drop=at_fault)  # else a stop costs nothing that was given already
        finally:
            if self._behind.ended:  # and not interrupted so often that it still writes to a folder that is its own
                self._work.close(keep=kind is not None and not at_fault and self._work.journal is not None)

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Write tensors to disk, so that few are kept in memory while the work goes on."""
        part, kept = self.folder / f"part-{self._parts:06}", _on_host(tensors)
        self._parts += 1
        self._later(lambda: save(kept, part), sum(tensor.nbytes for tensor in kept.values()))

    def add_file(self, source: Path) -> None:
        """Copy a file under its own name."""
        with self._on_disk():
            shutil.copyfile(source, self._final / source.name)

    def add_json(self, name: str, content: dict[str, Any]) -> None:
        with self._on_disk():
            (self._final / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def save(
        self,
        content: dict[str, Any],
        states: dict[str, Tensor],
        last: bool = False,
        read: Callable[[Tensor], None] = lambda _: None,
    ) -> None:
        """Keep this place of the work, whatever happens afterwards; not where the last one is hardly over, but `last`.

        content is JSON; states are what the work goes on with, and may change where `free` has returned. read: gets
        each as soon as it was read, in the thread that does so.
        """
        self._behind.check()
        if time.monotonic() < self._next_save and not last:
            return
        self._behind.wait()
        self._next_save = math.inf
        kept, content, parts = _on_host(states), copy.deepcopy(content), self._parts
        self._unsaved = unsaved = {state.data_ptr(): Event() for state in kept.values()}

        def written(name: str) -> None:
            state = kept.pop(name)
            read(state)
            unsaved[state.data_ptr()].set()

        self._later(lambda: self._keep(content, parts, kept, written))

    def free(self, state: Tensor) -> None:
        """Wait until a state may change, or its memory be given away: it is not being saved, or is in the file."""
        event = self._unsaved.get(state.data_ptr())
        while event is not None and not event.wait(1):  # seconds
            self._behind.check()

    def states(self) -> Iterator[tuple[str, Tensor]]:
        """What `save` was given last."""
        try:
            with safe_open(self.folder / f"states-{self._states or 0:06}", "pt") as f:
                for name in f.keys():  # noqa: SIM118 - not a dict
                    yield name, f.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise GlqError(f"{self.folder} is damaged ({error}): --restart begins anew") from error

    def commit(self) -> None:
        """Make shards of the parts that are left, write the index, and move all to its place in one step."""
        self._behind.wait()
        with self._on_disk():
            self._make_shards(self._parts, last=True)
            count, names = len(self._shards), dict[int, str]()
            weight_map, digests = dict[str, str](), dict[str, str]()
            for i, shard in enumerate(self._shards):
                names[i] = SINGLE if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"
                weight_map |= dict.fromkeys(shard["tensors"], names[i])
                digests[names[i]] = shard["sha256"]
                os.replace(self._shard(i), self._final / names[i])
            if count > 1:
                total = sum(file.stat().st_size for file in self._final.glob("*.safetensors"))
                self.add_json(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            self.add_json(DIGESTS, {"sha256": dict(sorted(digests.items()))} | self._config_digest())
            sync_folder(self._final)
            if self.out.exists():
                self.out.rmdir()
            os.replace(self._final, self.out)
            sync_folder(self.out.absolute().parent)

    def _later(self, job: Callable[[], None], nbytes: int = 0) -> None:
        """Have something written by the thread."""

        def on_disk() -> None:
            with self._on_disk():
                job()

        self._behind.give(on_disk, nbytes)

    def _keep(
        self, content: dict[str, Any], parts: int, states: dict[str, Tensor], written: Callable[[str], None]
    ) -> None:
        """Write states, then the journal that names them and so many parts; the thread's part of `save`."""
        begun = time.monotonic()
        number = 0 if self._states is None else self._states + 1
        save(states, self.folder / f"states-{number:06}", written)
        old, self._states, self.saved, self._safe = self._states, number, content, parts
        self._write_journal()
        if old is not None:
            (self.folder / f"states-{old:06}").unlink()
        self._make_shards(parts, last=False)
        now = time.monotonic()
        self._next_save = now + _BETWEEN * (now - begun)

    def _config_digest(self) -> dict[str, str]:
        """Nothing where the weights are plain ones."""
        file = self._final / "config.json"
        quantized = file.exists() and "quantization_config" in read_json(file)
        return {"config": config_digest(read_config(self._final))} if quantized else {}

    def _resume(self, journal: dict[str, Any]) -> None:
        """Take up what the journal names, and remove what it does not."""
        self._parts, self._shards, self._states = journal["parts"], journal["shards"], journal["states"]
        self._safe = self._parts
        self.saved = journal["saved"]
        self._final = self.folder / "final"
        for file in self._final.glob("model*.safetensors"):  # stopped while it was moved to its place
            number = re.match(r"model-(\d{5})-of-", file.name)
            os.replace(file, self._shard(int(number[1]) - 1 if number else 0))
        shutil.rmtree(self._final, ignore_errors=True)
        self._final.mkdir()
        kept = {self._shard(i).name for i in range(len(self._shards))} | {f"states-{self._states or 0:06}"}
        kept |= {f"part-{i:06}" for i in range(self._sharded, self._parts)}
        if self.saved is not None and not all((self.folder / name).exists() for name in kept):
            self._work.clear()  # it was stopped when everything was in its place, which is gone since
            self._resume(_NOTHING)
            return
        for file in self.folder.iterdir():
            if re.match("(part|shard|states)-", file.name) and file.name not in kept:
                file.unlink()

    @property
    def _sharded(self) -> int:
        """How many parts are in shards."""
        return self._shards[-1]["end"] if self._shards else 0

    def _shard(self, i: int) -> Path:
        return self.folder / f"shard-{i:06}"

    def _make_shards(self, parts: int, last: bool) -> None:
        """Join so many parts in order to shards as they are full; the last ones, too, if there will be no more."""
        end, size = self._sharded, 0
        for i in range(self._sharded, parts):
            more = (self.folder / f"part-{i:06}").stat().st_size
            if end < i and size + more > SHARD_BYTES:
                self._make_shard(end, i, last)
                end, size = i, 0
            size += more
        if last and end < parts:
            self._make_shard(end, parts, last)

    def _make_shard(self, start: int, end: int, last: bool) -> None:
        names, digest = join([self.folder / f"part-{i:06}" for i in range(start, end)], self._shard(len(self._shards)))
        self._shards = [*self._shards, {"end": end, "tensors": names, "sha256": digest}]
        if not last:
            self._write_journal()
        for i in range(start, end):
            if not last or i >= self._safe:  # the journal knows nothing of the last shards, and needs these parts
                (self.folder / f"part-{i:06}").unlink()

    def _write_journal(self) -> None:
        content = {"parts": self._safe, "shards": self._shards, "states": self._states, "saved": self.saved}
        self._work.write(content)

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = error.strerror or error
            raise ResumableError(
                f"cannot write {self.out}: {what}. Free some space and give the same command again"
            ) from error


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of a GPU as copies, which are made here: its queue and its graphs are this thread's. Others as they are."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
