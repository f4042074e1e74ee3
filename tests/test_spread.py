"""Rounding shared out to several devices gives the bytes of one: threads on the CPU, or GPUs where there are two."""

import threading

import pytest
import torch
from conftest import make_moe

from glq import GlqError, Settings, quantize, spread


def test_results_come_in_the_order_of_the_tasks_and_the_largest_begins():
    begun, both = [], threading.Barrier(2, timeout=60)

    def task(size):
        def work(index):
            begun.append(size)
            if size > 6:
                both.wait()  # two threads, or none goes on
            return size, index

        return spread.Task(size, work)

    cpu = torch.device("cpu")
    done = spread.run([cpu, cpu], [task(size) for size in (3, 8, 1, 7)])
    assert [size for size, _ in done] == [3, 8, 1, 7]
    assert sorted(begun[:2]) == [7, 8]
    assert [index for _, index in spread.run([cpu], [task(1), task(2)])] == [0, 0]


def test_of_tasks_as_large_the_first_device_takes_what_is_most_to_copy():
    """Whichever thread is first: each waits until both have one."""
    taken = {}
    for _ in range(20):
        both = threading.Barrier(2, timeout=60)

        def task(size, nbytes, both=both):
            def work(index):
                taken[nbytes] = index
                both.wait()

            return spread.Task(size, work, nbytes)

        cpu = torch.device("cpu")
        spread.run([cpu, cpu], [task(100, 10), task(99, 80), task(50, 1), task(49, 90)])
        assert taken == {10: 1, 80: 0, 1: 1, 90: 0}


def test_what_a_task_raises_is_raised_and_no_more_begin():
    begun = []

    def work(index):
        begun.append(index)
        raise GlqError("broken")

    cpu = torch.device("cpu")
    with pytest.raises(GlqError, match="broken"):
        spread.run([cpu, cpu], [spread.Task(1, work)] * 9)
    assert len(begun) <= 2


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["cpu", "tpu"], "'tpu' cannot be used"),
        (["cpu", "meta"], "different kinds"),
        (["meta", "meta"], "named twice"),
        (["99"], "'cuda:99' cannot be used: .*; there are [0-9]+ GPUs"),
    ],
)
def test_devices_that_will_not_do_are_refused(names, match):
    with pytest.raises(GlqError, match=match) as info:
        spread.pick_devices(names)
    assert "\n" not in str(info.value)


def weights(folder):
    return [(folder / name).read_bytes() for name in ("model.safetensors", "config.json", "quantization.json")]


DEVICES = ["0", "1"] if torch.cuda.device_count() > 1 else ["cpu", "cpu"]


@pytest.mark.parametrize("side_by_side", [False, True])
def test_several_devices_write_the_bytes_of_one(side_by_side, tiny_model, text_file, tmp_path):
    """Two codecs in a group, so that there is something to share out in any case."""
    settings = Settings(3, "nested-3", (("*.v_proj", "nested-4"),), tokens=512, ctx=64, side_by_side=side_by_side)
    for name, options in (("one", {"device": DEVICES[0].replace("0", "cuda:0")}), ("two", {"devices": DEVICES})):
        quantize(tiny_model, tmp_path / name, settings, calibration=text_file, **options)
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_experts_are_shared_out(text_file, tmp_path):
    model = make_moe(tmp_path / "model", "qwen3-moe")
    settings = Settings(3, "nested-3", tokens=512, ctx=64)
    for name, devices in (("one", DEVICES[:1]), ("two", DEVICES), ("three", ["cpu"] * 3)):
        if DEVICES[0] == "cpu" or name != "three":
            quantize(model, tmp_path / name, settings, calibration=text_file, devices=devices)
    one, *others = (weights(folder) for name in ("one", "two", "three") if (folder := tmp_path / name).exists())
    assert all(other == one for other in others)


def test_side_by_side_only_the_first_group_is_as_before(tiny_model, text_file, tmp_path):
    """What q, k and v of the first block read is the same; what comes after them is not."""
    from safetensors.torch import load_file

    for name, value in (("chained", False), ("side", True)):
        settings = Settings(2, "e8-2", tokens=512, ctx=64, side_by_side=value)
        quantize(tiny_model, tmp_path / name, settings, calibration=text_file, device="cpu")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("chained", "side"))
    same = {name for name in a if name.endswith(".codes") and torch.equal(a[name], b[name])}
    assert same == {f"model.layers.0.self_attn.{key}_proj.codes" for key in "qkv"}


def test_one_device_or_several(tiny_model, text_file, tmp_path):
    with pytest.raises(GlqError, match="either one device, 'cpu', or several, 'cpu,cpu'"):
        quantize(tiny_model, tmp_path / "out", calibration=text_file, device="cpu", devices=["cpu", "cpu"])
