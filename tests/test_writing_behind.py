"""What a thread writes while the work goes on: parts, states and the journal. Nothing is lost or passed over."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread, Timer, main_thread

import pytest
import torch
from test_resume import content, model, run, whole  # noqa: F401 (fixtures)

import glq.preflight
import glq.shards
import glq.spill
import glq.writer
from glq.errors import ResumableError
from glq.unfinished import folder_of


@pytest.mark.parametrize("last", ["part-000029", "states"])
def test_the_last_thing_that_cannot_be_written_is_said_too(last, run, whole, tmp_path, monkeypatch):  # noqa: F811
    """Nothing is written after it that could fail as well: 21 layers, 9 other tensors, and the last block's states."""

    def full(tensors, file, *args):
        if file.name == last or (file.name.startswith(last) and (file.parent / "part-000020").exists()):
            time.sleep(0.3)  # the work goes on meanwhile
            raise OSError(28, "No space left on device")
        save(tensors, file, *args)

    save = glq.writer.save
    with monkeypatch.context() as broken:
        broken.setattr("glq.writer.save", full)
        with pytest.raises(ResumableError, match="No space left on device"):
            run()
    assert not (tmp_path / "out").exists()
    assert not list(folder_of(tmp_path / "out").glob("part-000030"))
    assert run()[:1] != [1]
    assert content(tmp_path / "out") == whole


@pytest.mark.parametrize("which", ["part", "states"])
def test_an_error_that_passes_is_not_passed_over(which, run, whole, tmp_path, monkeypatch):  # noqa: F811
    """A single write fails, in the second block: nothing that comes after it may be taken for whole."""
    failed = []

    def once(tensors, file, *args):
        if not failed and file.name.startswith(which) and (file.parent / "journal.json").exists():
            failed.append(file)
            raise OSError(5, "Input/output error")
        save(tensors, file, *args)

    save = glq.writer.save
    with monkeypatch.context() as broken:
        broken.setattr("glq.writer.save", once)
        broken.setattr("glq.writer._BETWEEN", 0)
        with pytest.raises(ResumableError, match="Input/output error"):
            run()
    journal = json.loads((folder_of(tmp_path / "out") / "journal.json").read_text())
    assert journal["saved"]["blocks"] == 1
    assert run()[0] == 5
    assert content(tmp_path / "out") == whole


def test_a_state_that_is_being_saved_does_not_change(tmp_path, monkeypatch):
    go, save, read = Event(), glq.writer.save, []

    def slow(tensors, file, *args):
        go.wait()
        save(tensors, file, *args)

    monkeypatch.setattr("glq.writer.save", slow)
    state, other = torch.zeros(1000), torch.zeros(1000)

    def stopped():
        with glq.writer.CheckpointWriter(tmp_path / "out", {}) as writer:
            writer.save({}, {"reference.000000": state}, read=lambda tensor: read.append(tensor.data_ptr()))
            writer.free(other)
            change = Thread(target=lambda: (writer.free(state), state.fill_(1)))
            change.start()
            change.join(0.2)
            waited = change.is_alive()
            go.set()
            change.join()
            assert waited
            assert read == [state.data_ptr()]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with glq.writer.CheckpointWriter(tmp_path / "out", {}) as writer:
        assert [(name, saved.count_nonzero().item()) for name, saved in writer.states()] == [("reference.000000", 0)]


def test_who_waits_for_a_state_hears_of_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        time.sleep(0.1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("glq.writer.save", full)
    state = torch.zeros(1000)

    def waits():
        with glq.writer.CheckpointWriter(tmp_path / "out", {}) as writer:
            writer.save({}, {"reference.000000": state})
            writer.free(state)

    with pytest.raises(ResumableError, match="No space"):
        waits()
    assert not list(tmp_path.iterdir())


def test_a_second_interrupt_waits_for_no_more_than_what_is_being_written(tmp_path, monkeypatch):
    go, save, state, shutdown = Event(), glq.writer.save, torch.ones(1000), ThreadPoolExecutor.shutdown

    def shut_down(pool, **options):
        shutdown(pool, wait=False, **options)  # what has not begun is dropped
        go.set()
        shutdown(pool)

    monkeypatch.setattr("glq.writer.save", lambda *args: go.wait() and save(*args))
    monkeypatch.setattr("glq.background.ThreadPoolExecutor.shutdown", shut_down)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

    def stopped():
        with glq.writer.CheckpointWriter(tmp_path / "out", {}) as writer:
            writer.save({"blocks": 1}, {"reference.000000": state})
            writer.add({"weight": torch.zeros(10)})
            Timer(0.2, signal.pthread_kill, (main_thread().ident, signal.SIGINT)).start()
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            stopped()
    finally:
        signal.signal(signal.SIGINT, before)
    folder = folder_of(tmp_path / "out")
    assert sorted(file.name for file in folder.iterdir()) == ["final", "journal.json", "lock", "states-000000"]
    with glq.writer.CheckpointWriter(tmp_path / "out", {}) as writer:
        assert writer.saved == {"blocks": 1}


def test_no_state_is_overwritten_before_it_is_free(run, whole, tmp_path, monkeypatch):  # noqa: F811
    """Each of both models' states, in all blocks, is asked for while it is still the one that the block read."""
    asked = []
    monkeypatch.setattr("glq.writer.CheckpointWriter.free", lambda _, state: asked.append(state.clone()))
    run()
    batches = 1
    assert len(asked) == 2 * batches * 3
    assert torch.equal(asked[0], asked[1])  # what enters the first block is the same in both
    assert content(tmp_path / "out") == whole
