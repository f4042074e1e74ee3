"""`glq push` puts every file of a checkpoint onto a hub, byte for byte, and nothing of a damaged one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from typer.testing import CliRunner

from glq.cli import app

ROOT = Path(__file__).parent.parent
runner = CliRunner()


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    with hub_server.running() as found:
        yield found


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "out")


def push(hub, *arguments):
    return runner.invoke(app, ["push", *map(str, arguments), "--endpoint", hub.url])


def test_every_file_arrives(hub, checkpoint):
    (checkpoint / ".private").write_text("not for others")
    result = push(hub, checkpoint, "me/tiny", "--private", "--message", "the first")
    assert result.exit_code == 0, result.output + str(result.exception)
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir() if file.name != ".private"}
    assert hub.repos["me/tiny"] == files
    assert {"README.md", "report.html", "model.safetensors", "config.json"} <= files.keys()
    assert b'from_pretrained("me/tiny"' in files["README.md"]
    assert b"<h1>me/tiny</h1>" in files["report.html"]
    assert hub.private["me/tiny"]
    assert hub.messages == ["the first"]
    assert hub.tokens == {"Bearer hf_of_a_test"}
    assert f"{hub.url}/me/tiny" in result.output
    assert "states no licence" in result.output
    assert "no figures" in result.output


def test_what_was_pushed_comes_back(hub, checkpoint, tmp_path):
    push(hub, checkpoint, "me/tiny")
    options = {"endpoint": hub.url, "cache_dir": tmp_path / "cache"}
    folder = Path(snapshot_download("me/tiny", **options))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == hub.repos["me/tiny"]
    hub.repos["me/tiny"]["new.txt"] = b"later"
    assert (Path(snapshot_download("me/tiny", **options)) / "new.txt").read_bytes() == b"later"
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("me/other", **options)


def test_transformers_loads_what_was_pushed(hub, checkpoint, tmp_path):
    """In a process of its own, as huggingface_hub reads its settings once."""
    push(hub, checkpoint, "me/tiny")
    code = (
        "import glq.hf_integration\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained('me/tiny')\n"
        "model = AutoModelForCausalLM.from_pretrained('me/tiny', device_map='cpu')\n"
        "print(model.generate(**tokenizer('w1 w2', return_tensors='pt'), max_new_tokens=3).shape[1])"
    )
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout.split() == ["5"]


def test_a_damaged_checkpoint_stays_at_home(hub, checkpoint):
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    result = push(hub, checkpoint, "me/tiny")
    assert result.exit_code == 2
    assert "sha256 differs" in result.stderr
    assert hub.repos == {}


def test_what_the_hub_refuses_is_told_in_a_line(hub, checkpoint):
    hub.refused.add("them/tiny")
    result = push(hub, checkpoint, "them/tiny")
    assert result.exit_code == 2
    assert "refused them/tiny" in result.stderr
    assert "hf auth login" in result.stderr
    assert result.stderr.count("\n") <= 2
    result = push(hub, checkpoint, "tiny")
    assert "named like you/model" in result.stderr
    (checkpoint / "README.md").unlink()
    result = push(hub, checkpoint, "me/tiny")
    assert "has no README.md" in result.stderr


def test_without_a_network_one_line_says_so_and_the_card_stays(checkpoint):
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    result = runner.invoke(app, ["push", str(checkpoint), "me/x", "--endpoint", "http://127.0.0.1:9"])
    assert result.exit_code == 2
    assert "me/x was not uploaded, http://127.0.0.1:9 cannot be reached" in result.stderr
    assert "auth login" not in result.stderr
    assert result.stderr.count("\n") <= 2
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before


def test_another_hub_is_spoken_to_without_xet(checkpoint):
    """In a process of its own, as huggingface_hub reads its settings once."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_HUB_DISABLE")} | {"HF_TOKEN": "hf_x"}
    with hub_server.running() as hub:
        command = [sys.executable, "-m", "glq", "push", checkpoint, "me/tiny", "--endpoint", hub.url]
        subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=120)
        assert hub.repos["me/tiny"]["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
