"""The command line does what the functions do, and prints what the files say."""

import json
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import glq
from glq.cli import app
from glq.evaluation import evaluate
from glq.pipeline import Result
from glq.progress import Progress as Step
from glq.unfinished import folder_of

runner = CliRunner()


def run(*arguments) -> str:
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output + str(result.stderr)
    return result.output


def test_quantize_writes_the_same_bytes_as_the_api(tiny_model, tiny_checkpoint, text_file, tmp_path):
    options = ["--bits", 3, "--calibration", text_file, "--tokens", 512, "--ctx", 64, "--device", "cpu"]
    output = run("quantize", tiny_model, tmp_path / "out", *options)
    assert "stored bits a weight" in output
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tiny_checkpoint / "model.safetensors").read_bytes()


def test_a_codec_brings_its_bits(monkeypatch, tiny_model, tmp_path):
    asked = {}

    def record(model, out, settings, **_):
        asked["settings"] = settings
        return Result(out, 4.025, 0.0, 0, {}, file_bytes=1000, other_bytes=600)

    monkeypatch.setattr("glq.recipe.quantize", record)
    output = run("quantize", tiny_model, tmp_path / "out", "--codec", "nested-4")
    assert (asked["settings"].bits, asked["settings"].codec) == (4, "nested-4")
    assert "4.025 stored bits a weight, 1,000 bytes" in output
    assert "600 bytes of it stay in 16 bits" in output
    assert "--embeddings 4" in output


def test_ctrl_c_says_where_it_stopped_and_the_next_run_that_it_goes_on(monkeypatch, tiny_model, tmp_path):
    out = tmp_path / "out"

    def stopped(model, out, settings, *, progress, **_):
        progress(Step("rounding", 3, 8, ""))
        if not out.exists():
            out.mkdir()
            folder_of(out).mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("glq.recipe.quantize", stopped)
    result = runner.invoke(app, ["quantize", str(tiny_model), str(out)])
    assert result.exit_code == 130
    assert "going on after 2 of 8 that a run before did" in result.stderr
    assert "stopped: rounding, 3 of 8. The same command goes on at the last saved block" in result.stderr
    folder_of(out).rmdir()
    result = runner.invoke(app, ["quantize", str(tiny_model), str(out)])
    assert "stopped: rounding, 3 of 8. Nothing of it is kept" in result.stderr


def test_ctrl_c_while_it_starts_is_no_traceback():
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'glq.cli': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from glq.__main__ import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_info_counts_the_files(tiny_checkpoint):
    content = json.loads(run("info", tiny_checkpoint, "--json"))
    assert content["file_bytes"] == (tiny_checkpoint / "model.safetensors").stat().st_size
    assert content["bits"] == 8 * content["quantized_bytes"] / content["quantized_weights"]
    assert len(content["layers"]) == 14
    assert f"{content['bits']:.4f}" in run("info", tiny_checkpoint)


def test_eval_scores_and_writes_json(tiny_model, tiny_checkpoint, text_file, tmp_path):
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "out")  # whose report it writes to
    file = tmp_path / "scores.json"
    options = ["--reference", tiny_model, "--text", text_file, "--tokens", 256, "--ctx", 64, "--device", "cpu"]
    output = run("eval", checkpoint, *options, "--json", file)
    assert "reference" in output
    reference, candidate = json.loads(file.read_text())
    assert reference["kl"] == pytest.approx(0, abs=1e-6)
    assert reference["top1"] == 1
    assert reference["bits"] is None
    assert 0 < candidate["kl"] < 1
    assert candidate["tokens"] == 4 * 63
    assert candidate["nonfinite"] == 0
    assert candidate["bits"] == glq.inspect(tiny_checkpoint).bits


def test_eval_agrees_with_plain_cross_entropy(tiny_model, tiny_checkpoint, text_file):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (score,) = evaluate(tiny_model, [], text=text_file, tokens=256, ctx=64, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = torch.tensor(tokenizer(text_file.read_text())["input_ids"][:256]).view(4, 64)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert score.perplexity == pytest.approx(model(ids, labels=ids).loss.exp().item(), rel=1e-4)


def test_generate_prints_text(tiny_checkpoint):
    output = run("generate", tiny_checkpoint, "w1 w2 w3", "--max-tokens", 5, "--device", "cpu")
    assert output.startswith("w1 w2 w3")
    assert len(output.split()) == 8


def test_a_plan_is_made_once_and_allocated_again_for_another_rate(tiny_model, text_file, tmp_path):
    first, second, out = tmp_path / "first.json", tmp_path / "second.json", tmp_path / "out"
    options = ["--calibration", text_file, "--tokens", 512, "--ctx", 64, "--device", "cpu"]
    table = run("plan", tiny_model, first, "--bits", 2.3, *options)
    assert table.count("trellis-") == 8
    run("plan", tiny_model, second, "--bits", 3.4, "--measured", first)
    before, after = json.loads(first.read_text()), json.loads(second.read_text())
    assert after["bits"] == 3.4
    assert [g["sensitivity"] for g in after["groups"]] == [g["sensitivity"] for g in before["groups"]]
    run("quantize", tiny_model, out, "--plan", second, *options)
    assert glq.inspect(out).config.modules[after["groups"][0]["layers"][0]].codec == after["groups"][0]["codec"]
    assert json.loads((out / "glq_plan.json").read_text()) == after


def test_a_log_has_a_line_now_and_then_with_the_time_that_is_left(capfd, monkeypatch):
    from rich.console import Console

    from glq.commands import console

    monkeypatch.setattr(console, "err", Console(stderr=True))
    now = [0.0]
    plain = console.Plain(lambda: now[0])
    for done in range(8, 121):  # eight by a run before; 40 s each
        plain.update("rounding", done, 120)
        now[0] += 40
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "rounding 10/120, 1:13:20 left"
    assert lines[-1] == "rounding 120/120, 0:00:00 left"
    assert 50 < len(lines) < 80
    assert console.time_left(290, 0, 113) == "-:--:--"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", "nodir", "out"], "there is no directory nodir"),
        (["quantize", "MODEL", "MODEL"], "exists and is not an empty directory"),
        (["quantize", "MODEL", "out", "--bits", "5"], "between 1.5 and 4, found 5"),
        (["quantize", "MODEL", "out", "--fit", "abc"], "like 12GB"),
        (["quantize", "MODEL", "out", "--calibration", "nofile"], "there is no text file nofile"),
        (["plan", "nodir", "--fit", "1GB"], "there is no directory nodir"),
        (["eval", "nodir"], "there is no directory nodir"),
        (["push", "nodir", "me/x"], "there is no directory nodir"),
        (["compare", "nodir"], "there is no directory nodir"),
        (["compare", "MODEL", "MODEL"], "is named twice"),
        (["quantize", "MODEL", "a-file"], "a-file is a file: name the directory to write"),
        (["quantize", "MODEL", "out", "--calibration", "."], ". is a directory: name a UTF-8 text file"),
        (["quantize", "MODEL", "out", "--ctx", "0"], "at least 16 tokens, found --ctx 0"),
        (["quantize", "MODEL", "out", "--codec", "nested-4", "--bits", "3"], "stores 4 bits, not 3: ask for 4"),
        (["quantize", "MODEL", "out", "--fit", "12"], "found '12': 12GB?"),
        (["eval", "MODEL", "--reference", "MODEL", "--tokens", "0"], "0 tokens are less than a window of 1024"),
        (["eval", "MODEL", "--reference", "MODEL", "--json", "no/x.json"], "there is no directory no for --json"),
        (["generate", "MODEL", "w1", "--max-tokens", "0"], "--max-tokens must be at least 1, found 0"),
        (["chat", "MODEL", "--max-tokens", "-3"], "--max-tokens must be at least 1, found -3"),
        (["chat", "MODEL", "--temperature", "-1"], "--temperature must be at least 0, found -1"),
    ],
)
def test_a_slip_is_told_in_a_line(arguments, said, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("")
    result = runner.invoke(app, [argument.replace("MODEL", str(tiny_model)) for argument in arguments])
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_slip_costs_no_import_of_torch():
    code = (
        "import sys; from glq.cli import app\n"
        "try: app(['quantize', 'nodir', 'out'])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"]
