"""Rounding on a Ray cluster of two nodes on this machine gives the bytes of one process, even if a worker is killed."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import make_model

from glq import GlqError, Settings, quantize
from glq.cluster import workers_of

SETTINGS = Settings(2, "e8-2", (("*.v_proj", "nested-3"),), tokens=256, ctx=64, side_by_side=True)
CPU = torch.device("cpu")


def ask(model, folder, text, **options):
    out = folder / "out"  # its name is in the model card
    quantize(model, out, SETTINGS, calibration=text, device="cpu", **options)
    return {file.name: file.read_bytes() for file in out.iterdir() if not file.name.startswith("report.")}


def test_without_ray_or_a_cluster_an_error_of_one_line(tiny_model, text_file, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(GlqError, match=r"takes Ray: pip install"):
        ask(tiny_model, tmp_path / "out", text_file, ray="auto")
    with pytest.raises(GlqError, match="either to devices, 'cpu,cpu', or to a Ray cluster, 'auto'"):
        quantize(tiny_model, tmp_path / "out", devices=["cpu", "cpu"], ray="auto")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as env:
        env.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # of the workers
        env.setenv("RAY_USAGE_STATS_ENABLED", "0")
        node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
        started = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        started.add_node(**node)
        yield started
        started.shutdown()


@pytest.fixture
def one_thread():
    """As many as the nodes have processors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 2}
    return make_model(tmp_path_factory.mktemp("ray") / "model", **sizes)


class Killer(threading.Thread):
    """Kills a worker that rounds, as soon as there is one, so many times."""

    def __init__(self, times):
        super().__init__(daemon=True)
        self.times, self.killed = times, []

    def run(self):
        while len(self.killed) < self.times:
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    title = (folder / "cmdline").read_bytes()
                except OSError:
                    continue
                if title.startswith(b"ray::_round") and folder.name not in self.killed:
                    time.sleep(0.1)  # well into it
                    os.kill(int(folder.name), signal.SIGKILL)
                    self.killed.append(folder.name)
                    break
            time.sleep(0.01)


@pytest.mark.slow
def test_two_nodes_write_the_bytes_of_one_process_though_workers_are_killed(
    cluster, one_thread, model, text_file, tmp_path
):
    whole = ask(model, tmp_path / "whole", text_file)
    assert ask(model, tmp_path / "ray", text_file, ray=cluster.address) == whole
    killer = Killer(2)
    killer.start()
    assert ask(model, tmp_path / "killed", text_file, ray=cluster.address) == whole
    assert len(killer.killed) == 2


@pytest.mark.slow
def test_places_are_those_that_round_alike(cluster, one_thread, model, text_file, tmp_path, monkeypatch):
    with workers_of([CPU], cluster.address) as workers:
        assert workers.count == 2
    monkeypatch.setattr("glq.cluster.likeness", lambda _: {"PyTorch": "1.0"})
    mine = re.escape(torch.__version__)
    with pytest.raises(GlqError, match=rf"^\S+ of the Ray cluster .* it has PyTorch {mine}, not 1.0"):
        ask(model, tmp_path / "out", text_file, ray=cluster.address)
    torch.set_num_threads(2)
    with pytest.raises(GlqError, match="no machine of the Ray cluster has 2 processors, as many as this process has"):
        ask(model, tmp_path / "out", text_file, ray=cluster.address)


@pytest.mark.slow
def test_no_cluster_answers(tmp_path):
    pytest.importorskip("ray")
    with (
        pytest.raises(GlqError, match="no Ray cluster answers at '127.0.0.1:1'") as info,
        workers_of([CPU], "127.0.0.1:1"),
    ):
        pass
    assert "\n" not in str(info.value)
