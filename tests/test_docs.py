"""README and the pages say what runs: command lines parse, Python blocks are run, links lead somewhere."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import glq
from glq.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands
SMALL = {  # a tiny model, and little text
    '"org/model"': "MODEL",
    '"my_text.txt"': "TEXT",
    '"other_text.txt"': "TEXT",
    "glq.Settings(bits=3)": 'glq.Settings(2, "e8-2", tokens=256, ctx=64)',
    "glq.TuneSettings()": "glq.TuneSettings(steps=1, batch=1, ctx=64)",
    "text=TEXT": "text=TEXT, tokens=256, ctx=64",
}
runner = CliRunner()


def command_lines() -> list[str]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^(?: {4}|\$ )(glq .+)$", text, re.MULTILINE) + re.findall(r"`(glq [a-z]+ [^`]+)`", text)
        found += [line.split("  #")[0].strip() for line in blocks]
    return sorted(set(found))


@pytest.mark.parametrize("line", command_lines())
def test_command_lines_are_what_the_program_takes(line):
    name, *arguments = shlex.split(line.replace("…", ""))[1:]
    command = COMMANDS[name]
    known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
    if not command.ignore_unknown_options:
        asked = {a.split("=")[0] for a in arguments if a.startswith("--")}
        assert asked <= known, f"{line}: no {asked - known}"


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_python_blocks_run(page, tiny_model, tiny_checkpoint, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = {"MODEL": str(tiny_model), "TEXT": str(text_file)}
    blocks = python_blocks(page)
    assert blocks
    for block in blocks:
        for old, new in SMALL.items():
            block = block.replace(old, new)
        block = block.replace('device_map="auto", ', 'device_map="cpu", ')
        exec(compile(block, page, "exec"), space)  # the block of the page, nothing of a stranger's
    assert (tmp_path / "out" / "report.html").is_file()
    assert space["quantized"].kl > 0


def test_the_first_commands_of_the_readme_lead_to_a_chat(tiny_model, tmp_path, monkeypatch):
    """Of its first 30 lines, those of glq, with a tiny model for the fetched one and little text."""
    monkeypatch.chdir(tmp_path)
    first = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:30]).partition("## Your own")[0]
    assert "pip install" in first
    assert "python tools/fetch_model.py smollm2 " in first
    shutil.copytree(tiny_model, "smollm2")
    lines = re.findall(r"^ {4}(glq .+?)(?: {2,}#.*)?$", first, re.MULTILINE)
    assert [line.split()[1] for line in lines] == ["doctor", "quantize", "eval", "chat"]
    for line in lines:
        name, *arguments = shlex.split(line)[1:]
        little = ["--tokens", "256", "--ctx", "64"] if name in ("quantize", "eval") else []
        result = runner.invoke(app, [name, *arguments, *little, "--device", "cpu"], input="w1\n/quit\n")
        assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "report.html").is_file()


def test_links_lead_somewhere():
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
        for target in re.findall(r"`?((?:docs|bench|tools|tests)/[\w/]+\.(?:md|py|svg))`?", text):
            assert (ROOT / target).exists(), f"{page.name}: {target}"


def test_nobody_is_sent_to_the_other_glq_on_pypi():
    said = [*PAGES, *(ROOT / "glq").rglob("*.py"), *(ROOT / "glq").rglob("*.j2")]
    found = [f.name for f in said if re.search(r"pip install (-U )?'?glq\b", f.read_text(encoding="utf-8"))]
    assert found in ([], ["decisions.md"])  # which tells of a mistake in such a line


def test_every_page_is_in_the_site():
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in listed, page.name
    api = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert {name for name in glq.__all__ if name not in api} == {"Plan"}


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_a_screen(name):
    result = runner.invoke(app, [name, "--help"] if name else ["--help"], env={"COLUMNS": "80", "LINES": "50"})
    assert result.exit_code == 0
    assert result.output.count("\n") <= 50, result.output


def test_the_version_and_a_number_that_is_none_take_little_room():
    assert runner.invoke(app, ["--version"]).output.split() == [glq.__version__]
    result = runner.invoke(app, ["quantize", "a", "b", "--bits", "three"])
    assert result.exit_code == 2
    assert "--bits" in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 4


def test_help_starts_without_what_takes_long():
    code = "import sys, glq.cli; print(sorted({'torch', 'transformers', 'numpy', 'jinja2'} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


def test_files_of_a_release_belong_together():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {glq.__version__}\n" in citation
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        assert set(re.findall(r"make ([a-z]+)", workflow.read_text(encoding="utf-8"))) <= targets
