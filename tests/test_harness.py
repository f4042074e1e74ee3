"""`glq eval --tasks`: figures of lm-evaluation-harness, on a task whose right answers are known."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from glq.cli import app
from glq.hf_integration import load
from glq.hub import load_tokenizer

runner = CliRunner()
TASK = """
task: known
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def test_without_the_harness_it_says_how_to_get_it(tiny_checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = runner.invoke(app, ["eval", str(tiny_checkpoint), "--tasks", "arc_easy"])
    assert result.exit_code == 2
    assert "pip install '.[eval]' in a clone" in result.stderr
    result = runner.invoke(app, ["eval", str(tiny_checkpoint)])
    assert result.exit_code == 2
    assert "--reference, or benchmarks, --tasks" in result.stderr


@pytest.fixture
def task(tmp_path, tiny_checkpoint):
    """Four questions; the model itself finds the answer of the first three more likely than the other word."""
    model, tokenizer = load(tiny_checkpoint, device="cpu"), load_tokenizer(tiny_checkpoint)
    rows = []
    for i in range(4):
        ids = tokenizer(f"w{i} w{i + 7}", return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            order = model(ids).logits[0, -1, 2:].argsort(descending=True)
        likely, unlikely = (f"w{int(order[k])}" for k in (0, -1))
        answer = 0 if i < 3 else 1
        rows.append({"context": f"w{i} w{i + 7}", "choices": [likely, unlikely], "answer": answer})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "known.yaml").write_text(TASK.format(data=data))
    return folder


@pytest.mark.slow  # the harness looks at all of its tasks first
def test_a_task_of_ones_own(task, tiny_checkpoint, tiny_model, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "scores.json"
    options = ["--tasks", "known", "--task-dir", str(task), "--device", "cpu", "--json", str(file)]
    result = runner.invoke(app, ["eval", str(tiny_checkpoint), str(tiny_model), *options])
    assert result.exit_code == 0, result.output + repr(result.exception)
    first, second = json.loads(file.read_text())
    (score,) = first["tasks"]
    assert (score["task"], score["metric"], score["value"]) == ("known", "acc", 0.75)
    assert second["model"] == str(tiny_model)
    assert len(second["tasks"]) == 1
    assert "0.7500" in result.output
    wrong = runner.invoke(app, ["eval", str(tiny_checkpoint), "--tasks", "nonesuch", "--device", "cpu"])
    assert wrong.exit_code == 2
    assert "knows no task nonesuch" in wrong.stderr
