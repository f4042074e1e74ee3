"""Work that was stopped: by a signal, a full disk, an error. It goes on where it was, and the bytes are the same."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_moe

import glq.preflight
import glq.shards
import glq.spill
import glq.writer
from glq import GlqError, Settings, quantize
from glq.errors import ResumableError
from glq.unfinished import UnfinishedFolder, folder_of

SETTINGS = Settings(3, "nested-3", tokens=256, ctx=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("resume") / "model", num_hidden_layers=3)


@pytest.fixture(scope="module")
def whole(model, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(model, out, SETTINGS, calibration=text_file, device="cpu")
    return content(out)


@pytest.fixture
def run(model, text_file, tmp_path):
    def start(stop=None, settings=SETTINGS, **options):
        """stop: raised when so many groups are rounded; or nothing."""
        seen = []

        def show(progress):
            seen.append(progress.done)
            if stop is not None and progress.done == stop[0]:
                raise stop[1]

        options = {"model": model, "calibration": text_file} | options
        quantize(out=tmp_path / "out", settings=settings, device="cpu", progress=show, **options)
        return seen

    return start


def content(folder):
    """All but the reports, which say how long it took."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith("report.")}


@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), 8, pytest.param(12, marks=pytest.mark.slow)])
def test_it_goes_on_at_the_last_finished_block(at, run, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run((at, KeyboardInterrupt()))
    blocks_done = (at - 1) // 4
    assert folder_of(tmp_path / "out").exists() == (blocks_done > 0)
    assert run()[0] == 4 * blocks_done + 1
    assert content(tmp_path / "out") == whole
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_embeddings_and_head_and_shards_go_on_too(run, tmp_path, monkeypatch):
    monkeypatch.setattr(glq.writer, "SHARD_BYTES", 30_000)
    monkeypatch.setattr("glq.pipeline.rate_codec", lambda bits: "e8-2")  # a trellis takes its time
    settings = replace(SETTINGS, embeddings=2, head=2)
    run(settings=settings)
    expected = content(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*"))) > 2
    shutil.rmtree(tmp_path / "out")
    for stop in (6, 10):
        with pytest.raises(KeyboardInterrupt):
            run((stop, KeyboardInterrupt()), settings)
    run(settings=settings)
    assert content(tmp_path / "out") == expected


@pytest.mark.slow
def test_experts_go_on_too(run, text_file, tmp_path):
    moe = make_moe(tmp_path / "moe", "qwen3-moe")
    run(model=moe)
    expected = content(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run((6, KeyboardInterrupt()), model=moe)
    run(model=moe)
    assert content(tmp_path / "out") == expected


def test_waiting_on_disk_changes_no_byte(run, whole, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(glq.preflight, "AWAY_FROM", 0)
    monkeypatch.setattr(glq.spill, "LEAST", 1000)
    put = []
    original = glq.spill.Spill._mapped
    monkeypatch.setattr(glq.spill.Spill, "_mapped", lambda self, t: put.append(t.nbytes) or original(self, t))
    with pytest.raises(KeyboardInterrupt):
        run((6, KeyboardInterrupt()))
    run()
    assert sum(put) > 1e6
    assert content(tmp_path / "out") == whole


@pytest.mark.parametrize(
    "where", ["save", *(pytest.param(name, marks=pytest.mark.slow) for name in ("join", "write_bytes", "_mapped"))]
)
def test_a_full_disk_says_so_and_goes_on_when_there_is_room(where, run, whole, tmp_path, monkeypatch):
    """The second half of a write fails: at a part, a state, a shard, or what waits."""
    calls = [0]

    def full(original):
        def call(*args, **options):
            calls[0] += 1
            if calls[0] > 20:
                raise OSError(28, "No space left on device")
            return original(*args, **options)

        return call

    monkeypatch.setattr(glq.preflight, "AWAY_FROM", 0 if where == "_mapped" else 2**40)
    monkeypatch.setattr(glq.spill, "LEAST", 1000)
    with monkeypatch.context() as broken:
        if where == "_mapped":
            broken.setattr("tempfile.TemporaryFile", full(__import__("tempfile").TemporaryFile))
        elif where == "write_bytes":
            broken.setattr("glq.shards.write_bytes", full(glq.shards.write_bytes))
        elif where == "join":
            broken.setattr("glq.writer.join", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        else:
            broken.setattr("glq.writer.save", full(glq.writer.save))
        with pytest.raises(ResumableError, match="No space left on device"):
            run()
    assert not (tmp_path / "out").exists()
    run()
    assert content(tmp_path / "out") == whole


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB, as root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("at", [5, 9, 12])
def test_a_disk_that_fills_up_says_so_and_goes_on_when_there_is_room(at, small_disk, model, whole, text_file):
    ballast = small_disk / "ballast"

    def fill(progress):
        if progress.done == at:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

    options = {"settings": SETTINGS, "calibration": text_file, "device": "cpu"}
    with pytest.raises(ResumableError, match="No space left on device") as info:
        quantize(model, small_disk / "out", progress=fill, **options)
    assert "\n" not in str(info.value)
    assert not (small_disk / "out").exists()
    assert folder_of(small_disk / "out").exists()
    ballast.unlink()
    seen = []
    quantize(model, small_disk / "out", progress=lambda p: seen.append(p.done), **options)
    assert seen[0] > 1
    assert content(small_disk / "out") == whole
    assert [file.name for file in small_disk.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seed": 1}, "settings seed: begun with 0, now 1"),
        pytest.param({"tokens": 576}, "settings tokens: begun with 256, now 576", marks=pytest.mark.slow),
    ],
)
def test_other_settings_are_named(change, match, run, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run((6, KeyboardInterrupt()))
    with pytest.raises(GlqError, match=f"{match}.* --restart to begin anew"):
        run(settings=replace(SETTINGS, **change))
    assert folder_of(tmp_path / "out").exists()
    assert run(settings=replace(SETTINGS, **change), restart=True)[0] == 1
    assert content(tmp_path / "out") != whole


def test_a_changed_model_is_named(run, model, tmp_path):
    copied = shutil.copytree(model, tmp_path / "copied")
    with pytest.raises(KeyboardInterrupt):
        run((6, KeyboardInterrupt()), model=copied)
    os.utime(copied / "model.safetensors")
    with pytest.raises(GlqError, match=r"model model.safetensors: begun with \[.*\], now"):
        run(model=copied)


def test_another_text_is_named(run, text_file, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run((6, KeyboardInterrupt()))
    (tmp_path / "other.txt").write_text(text_file.read_text() + " w1")
    with pytest.raises(GlqError, match="calibration: begun with"):
        run(calibration=tmp_path / "other.txt")


def test_an_error_of_the_work_itself_leaves_nothing(run, tmp_path):
    with pytest.raises(GlqError):
        run((6, GlqError("the model is broken")))
    assert not list(tmp_path.iterdir())


def test_what_was_stopped_in_its_last_moment_is_whole_or_goes_on(run, whole, tmp_path, monkeypatch):
    """Stopped before and after the checkpoint is moved to its place."""
    os_replace = os.replace
    for stop_at in (1, 2, 3):
        moves = [0]

        def replace_(source, target, moves=moves, stop_at=stop_at):
            if Path(target).name in ("model.safetensors", "out"):
                moves[0] += 1
                if moves[0] == stop_at:
                    raise KeyboardInterrupt
            os_replace(source, target)

        with monkeypatch.context() as broken:
            broken.setattr("os.replace", replace_)
            if stop_at < 3:
                with pytest.raises(KeyboardInterrupt):
                    run()
                assert not (tmp_path / "out").exists()
            else:
                run()
    assert content(tmp_path / "out") == whole


def test_one_process_at_a_time(run, tmp_path):
    first = UnfinishedFolder(tmp_path / "out", None)
    with pytest.raises(GlqError, match=f"process {os.getpid()} writes to .*out already: wait for it"):
        run()
    first.close(keep=False)
    run()


@pytest.mark.slow
def test_two_processes_one_wins_and_the_other_is_told(model, text_file, whole, tmp_path):
    options = ["--codec", "nested-3", "--tokens", "256", "--ctx", "64", "--device", "cpu"]
    line = [sys.executable, "-m", "glq", "quantize", str(model), str(tmp_path / "out"), *options]
    line += ["--calibration", str(text_file)]
    both = [subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate()[1].decode() for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes == [0, 2], said
    assert "already: wait for it" in "".join(said) or "nothing is overwritten" in "".join(said)
    assert content(tmp_path / "out") == whole


@pytest.mark.slow
def test_a_killed_process_goes_on(model, text_file, whole, tmp_path):
    options = ["--codec", "nested-3", "--tokens", "256", "--ctx", "64", "--device", "cpu"]
    line = [sys.executable, "-m", "glq", "quantize", str(model), str(tmp_path / "out"), *options]
    line += ["--calibration", str(text_file)]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (folder_of(tmp_path / "out") / "journal.json").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    assert content(tmp_path / "out") == whole


KILLED = """
import os, signal, sys
import glq.unfinished
from glq.cli import app
write, seen = glq.unfinished.UnfinishedFolder.write, []
def kill(self, journal):
    seen.append(1)
    if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, journal)
glq.unfinished.UnfinishedFolder.write = kill
import glq.writer
glq.writer._BETWEEN = 0
sys.argv = ["glq", *sys.argv[1:]]
app()
"""


def test_killed_between_the_states_and_the_journal_that_names_them(model, text_file, tmp_path):
    """All by processes of their own: what other tests left in this one may change the last digit of an error."""
    options = ["--calibration", str(text_file), "--codec", "nested-3", "--tokens", "256", "--ctx", "64"]

    def quantized(out, code="from glq.cli import app; app()"):
        line = [sys.executable, "-c", code, "quantize", str(model), str(tmp_path / out), *options, "--device", "cpu"]
        return subprocess.run(line, capture_output=True, text=True)

    (tmp_path / "whole").mkdir()  # the card has the last name
    assert quantized("whole/out").returncode == 0
    killed = quantized("out", KILLED)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = folder_of(tmp_path / "out")
    assert (folder / "states-000001").exists()
    assert json.loads((folder / "journal.json").read_text())["states"] == 0
    resumed = quantized("out")
    assert "going on after 4 of" in resumed.stdout + resumed.stderr, resumed.stderr
    assert content(tmp_path / "out") == content(tmp_path / "whole" / "out")


def test_what_does_not_fit_is_refused_with_figures(run, tmp_path, monkeypatch):
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
        with pytest.raises(GlqError, match=r"has 0.0 GB free, and quantizing takes 0.0 GB there"):
            run()
    monkeypatch.setattr("glq.preflight.available_memory", lambda: 10**8)
    with pytest.raises(GlqError, match=r"cpu has 0.1 GB of memory left, and quantizing takes 0.4 GB or more"):
        run()
    assert not list(tmp_path.iterdir())


def test_unfinished_work_is_not_what_it_says(run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run((6, KeyboardInterrupt()))
    folder = folder_of(tmp_path / "out")
    journal = json.loads((folder / "journal.json").read_text())
    (folder / "journal.json").write_text("{")
    with pytest.raises(GlqError, match="is not what glq left there: remove it, or --restart"):
        run()
    (folder / "journal.json").write_text(json.dumps(journal))
    (folder / f"states-{journal['states']:06}").write_bytes(b"x")
    with pytest.raises(GlqError, match="is damaged .*--restart begins anew"):
        run()


def test_views_and_strides_survive_a_wait_on_disk(tmp_path):
    spill = glq.spill.Spill(tmp_path)
    base = torch.randn(600, 700)
    view, turned = base[100:200], torch.randn(500, 800).T
    copies = [t.clone() for t in (base, view, turned)]
    with torch.no_grad():
        spill.put([view, turned, base])
        view += 1
        copies[0][100:200] += 1
        copies[1] += 1
        spill.put([view, turned])
    for tensor, copy in zip((base, view, turned), copies, strict=True):
        assert torch.equal(tensor, copy)
    assert turned.stride() == (1, 800)
    assert not list(tmp_path.iterdir())
    assert len(spill._live) == 2
    del base, view, turned, tensor
    assert not spill._live
