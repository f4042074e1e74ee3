"""Arguments and settings that are refused: an error of a line or two, before any work, and nothing is left."""

import subprocess
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from glq import GlqError, Settings, quantize
from glq.cli import app


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "/nowhere/model", "/nowhere/out"],
        ["quantize", "{model}", "{out}", "--bits", "7"],
        ["quantize", "{model}", "{out}", "--bits", "3", "--codec", "e8-2"],
        ["quantize", "{model}", "{out}", "--codec", "nonesuch"],
        ["quantize", "{model}", "{out}", "--layer", "v_proj"],
        ["quantize", "{model}", "{out}", "--layer", "*.v_proj=nonesuch"],
        ["quantize", "{model}", "{checkpoint}"],
        ["eval", "/nowhere/model", "--reference", "{model}"],
        ["info", "{model}"],
        ["generate", "/nowhere/model", "w1"],
        ["generate", "{checkpoint}", "w1", "--chat", "--device", "cpu"],
        ["generate", "{checkpoint}", "", "--device", "cpu"],
    ],
)
def test_command_line_errors_are_short_and_exit_with_2(arguments, tiny_model, tiny_checkpoint, tmp_path):
    places = {"model": tiny_model, "checkpoint": tiny_checkpoint, "out": tmp_path / "out"}
    result = CliRunner().invoke(app, [a.format(**places) for a in arguments])
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("glq:")
    assert "Traceback" not in result.output + result.stderr
    assert not (tmp_path / "out").exists()


def test_core_imports_without_extras():
    """`import glq`, and everything below the pipeline, runs where transformers and its friends are missing."""
    code = (
        "import sys\n"
        "for name in ('transformers', 'accelerate', 'huggingface_hub', 'typer', 'rich', 'greenlet'):\n"
        "    sys.modules[name] = None\n"
        "import glq, glq.linear, glq.checkpoint, glq.rounding\n"
        "try:\n    glq.quantize\n"
        "except ImportError as e:\n    assert '.[hf]' in str(e), e\n"
        "else:\n    raise SystemExit('no')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_uneven_shards_are_refused_before_work(refused, tiny_model, tiny_settings):
    refused(tiny_model, "o_proj reads 96 channels, which are not 2 equal", replace(tiny_settings, tensor_parallel=2))
    with pytest.raises(GlqError, match="at least 1, found 0"):
        replace(tiny_settings, tensor_parallel=0)


def test_shards_of_a_model_without_a_plan_are_refused(refused, tiny_model, tiny_settings, monkeypatch):
    monkeypatch.setattr("transformers.LlamaConfig.base_model_tp_plan", None)
    refused(tiny_model, "no tensor-parallel plan for 'llama'", replace(tiny_settings, tensor_parallel=2))


def test_a_misspelt_layer_is_refused_before_work(refused, tiny_model, tiny_settings):
    settings = replace(tiny_settings, layers=(("*.v_prj", "nested-4"),))
    refused(
        tiny_model, r"no layer matches '\*\.v_prj', which should take nested-4: there are 'model\.layers\.0\.", settings
    )


def test_a_misspelt_layer_is_refused_before_layers_are_measured(tiny_model, text_file, tmp_path):
    steps = []
    with pytest.raises(GlqError, match="no layer matches"):
        quantize(
            tiny_model,
            tmp_path / "out",
            Settings(bits=2.6, layers=(("*.v_prj", "nested-4"),), ctx=64),
            calibration=text_file,
            progress=steps.append,
        )
    assert not steps
    assert not list(tmp_path.iterdir())


def test_mixed_rates_and_a_codec_exclude_each_other(tiny_model, text_file, tmp_path):
    with pytest.raises(GlqError, match="leave out either mixed or the codec 'nested-4'"):
        quantize(tiny_model, tmp_path / "out", Settings(bits=4, codec="nested-4"), calibration=text_file, mixed=True)
    assert not list(tmp_path.iterdir())


def test_a_text_of_less_than_a_window_says_so(refused, tiny_model, tmp_path):
    (tmp_path / "few.txt").write_text("w1 w2 w3")
    refused(tiny_model, "it has 3 tokens, a window takes 64", Settings(ctx=64), tmp_path / "few.txt")
