"""`glq doctor` says what runs and why, and finds a kernel that is wrong; docs/hardware.md is what its script writes."""

import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import torch
from cubins import ARCHITECTURES
from typer.testing import CliRunner

from glq import doctor, nvrtc, selftest
from glq.cli import app
from glq.gpus import COMPILED, GPUS, bound, evidence

runner = CliRunner()
GPU = torch.device("cuda", 0)


def hardware():
    file = Path(__file__).parent.parent / "tools" / "hardware.py"
    spec = importlib.util.spec_from_file_location("hardware", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_on_a_cpu_the_reference_runs_and_is_right():
    result = runner.invoke(app, ["doctor", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.output)
    (choice,) = content["kernels"]
    assert choice["family"] == "PyTorch"
    assert "torch" in choice["why"]
    (tested,) = content["selftest"]
    assert tested["failure"] is None
    assert tested["error"] < 0.01
    assert tested["us"] > 0
    assert tested["bf16_us"] > 0
    assert {p["name"] for p in content["packages"]} >= {"torch", "triton", "cuda-core", "vllm"}


def test_a_wrong_kernel_is_named_and_the_exit_code_says_so(monkeypatch):
    def wrong(x, w):
        return selftest._reference(x, w) * 1.05

    kernel = selftest.Kernel("PyTorch", "five percent off", "trellis-4", 1, wrong)
    broken = selftest.Kernel("PyTorch", "does not compile", "trellis-4", 1, lambda x, w: 1 / 0)
    monkeypatch.setattr(selftest, "kernels", lambda device: [kernel, broken])
    result = runner.invoke(app, ["doctor", "--device", "cpu"])
    assert result.exit_code == 1
    assert "wrong:" in result.output
    assert "ZeroDivisionError" in result.output


def test_cores_that_others_have_are_told(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.getloadavg", lambda: (6.2, 0, 0))
    assert doctor.busy() == ("other work has 6.2 of 8 cores: OMP_NUM_THREADS=2 glq … may be several times faster here")
    monkeypatch.setattr("os.getloadavg", lambda: (20.0, 0, 0))
    assert "OMP_NUM_THREADS=1 " in doctor.busy()
    monkeypatch.setattr("os.getloadavg", lambda: (1.0, 0, 0))
    assert doctor.busy() is None


def test_reasons_for_each_family(monkeypatch):
    monkeypatch.setattr(doctor, "has_cuda_kernel", lambda x, codec: True)
    monkeypatch.setattr(doctor, "has_triton_kernel", lambda device, codec: True)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: None)
    assert [c.family for c in doctor.choices(GPU)] == ["CUDA C++"] * 3 + ["Triton"]

    def refused(x, codec):
        warnings.warn("glq's CUDA kernels cannot be used, Triton's are: driver too old", stacklevel=2)
        return False

    monkeypatch.setattr(doctor, "has_cuda_kernel", refused)
    first = doctor.choices(GPU)[0]
    assert first.family == "Triton"
    assert "driver too old" in first.why
    monkeypatch.setattr(doctor, "has_cuda_kernel", lambda x, codec: False)
    monkeypatch.setattr(nvrtc, "available", lambda: False)
    assert ".[cuda]" in doctor.choices(GPU)[0].why
    monkeypatch.setattr(doctor, "has_triton_kernel", lambda device, codec: False)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    choices = doctor.choices(GPU)
    assert {choice.family for choice in choices} == {"PyTorch"}
    assert all("Triton is not installed" in choice.why for choice in choices)


@pytest.mark.parametrize(("arch", "count"), [(90, 9), (120, 7)])
def test_every_kernel_that_a_gpu_may_take_is_tried(monkeypatch, arch, count):
    monkeypatch.setattr(nvrtc, "available", lambda: True)
    monkeypatch.setattr(nvrtc, "gpu", lambda device: type("Fake", (), {"arch": arch}))
    families = [k.family for k in selftest.kernels(GPU)]
    assert families.count("CUDA C++") == count
    assert families.count("Triton") == 4
    assert families[-1] == "PyTorch"


def test_architectures_are_those_that_the_tests_compile():
    assert list(COMPILED) == ARCHITECTURES
    assert {gpu.arch for gpu in GPUS} == set(COMPILED)
    assert evidence("sm_90") == "run and timed"
    assert "emulator" in evidence("sm_121")
    assert evidence("sm_75") == "not tried"


def test_the_hardware_page_is_what_its_script_writes():
    script = hardware()
    page = script.PAGE.read_text(encoding="utf-8")
    assert page == script.filled(page)
    assert bound(1000, 10**9) == 1000
    assert script.read_bytes("4 bits") == pytest.approx(3.49e9 + 1.05e9, rel=2e-3)  # docs/serving.md, "Memory"
