"""report.html, report.json, the card, `glq compare`: what they say is what the files and `glq eval` say."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from glq import GlqError, inspect
from glq.charts import heat, lines, scatter
from glq.cli import app
from glq.publishing import base_model
from glq.rendering import MARK, render_card, render_comparison, render_report, write_pages
from glq.report import after_tuning, read_report

runner = CliRunner()


class Page(HTMLParser):
    """Fails where tags are not closed in their order; keeps text and what would be fetched."""

    VOID = frozenset(("meta", "br", "link", "img", "rect", "circle", "line", "polyline", "wbr"))

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.fetched = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.fetched += [value for key, value in attributes if key in ("src", "href")]
        if tag not in self.VOID or tag in ("rect", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.fetched += [value for key, value in attributes if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


def page(html) -> str:
    parsed = Page(html)
    assert parsed.fetched == []  # self-contained
    assert "url(" not in html
    assert "@import" not in html
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html
    return " ".join(" ".join(parsed.text).split())


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "tiny-3bit")


@pytest.fixture(scope="session")
def evaluated(tiny_model, tiny_checkpoint, text_file, tmp_path_factory):
    """A copy, evaluated, and the figures that `glq eval` gave."""
    folder = tmp_path_factory.mktemp("evaluated")
    out, file = shutil.copytree(tiny_checkpoint, folder / "evaluated"), folder / "scores.json"
    options = ["--reference", str(tiny_model), "--text", str(text_file), "--tokens", "256", "--ctx", "64"]
    result = runner.invoke(app, ["eval", str(out), *options, "--device", "cpu", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "figures added" in result.output
    return out, json.loads(file.read_text())


def test_quantizing_writes_a_report_of_what_it_wrote(tiny_checkpoint, tiny_model):
    report, summary = read_report(tiny_checkpoint), inspect(tiny_checkpoint)
    made = json.loads((tiny_checkpoint / "quantization.json").read_text())
    assert report["bits"] == summary.bits
    assert report["sizes"]["file_bytes"] == (tiny_checkpoint / "model.safetensors").stat().st_size
    assert {name: layer["bits"] for name, layer in report["layers"].items()} == summary.module_bits
    assert {name: layer["error"] for name, layer in report["layers"].items()} == made["errors"]
    assert report["settings"] == made["settings"]
    assert report["seed"] == 0
    assert report["calibration_sha256"] == made["calibration_sha256"]
    assert report["run"]["seconds"] > 0
    assert report["run"]["peak_bytes"] > 10**8
    assert report["versions"].keys() >= {"glq", "python", "torch", "transformers"}
    assert report["base"]["bytes"] == (tiny_model / "model.safetensors").stat().st_size
    assert report["scores"] == []


def test_the_page_shows_it(tiny_checkpoint):
    report, html = read_report(tiny_checkpoint), (tiny_checkpoint / "report.html").read_text(encoding="utf-8")
    text = page(html)
    assert f"{report['bits']:.3f} stored bits a weight" in text
    assert "Not evaluated yet" in text
    assert f"{report['sizes']['quantized_bytes']:,}" in text
    assert html.count('class="cell"') == 14
    assert html.count('class="cell key"') == 4
    assert "model.<wbr>layers.<wbr>1.<wbr>mlp.<wbr>up_proj" in html
    assert html.count('class="dot') == 2 * 4  # errors: of q/k/v and of gate/up as one, since they are the same
    error = report["layers"]["model.layers.1.mlp.up_proj"]["error"]
    assert f"<title>gate_proj, up_proj, block 1: {error:.4g}</title>" in html


def test_evaluation_goes_into_report_page_and_card(evaluated):
    out, (reference, scored) = evaluated
    (entry,) = read_report(out)["scores"]
    assert entry["kl"] == scored["kl"]
    assert entry["reference_perplexity"] == reference["perplexity"]
    assert f"{scored['kl']:.4f} KL, nats a token" in page((out / "report.html").read_text(encoding="utf-8"))
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"| {scored['kl']:.4f} ({scored['kl_p99']:.3f}) | 0 |" in card
    assert "Not evaluated" not in card


def test_scores_on_the_same_text_are_replaced_and_tuning_drops_them(evaluated):
    from glq.report import add_scores

    report = read_report(evaluated[0])
    (entry,) = report["scores"]
    again = add_scores(report, [entry | {"kl": 0.5}])["scores"]
    assert [s["kl"] for s in again] == [0.5]
    assert len(add_scores(report, [entry | {"text_sha256": "other"}])["scores"]) == 2
    tuned = after_tuning(report, "better", 0.3, 0.2)
    assert tuned["scores"] == []
    assert "from 0.3000 to 0.2000" in page(render_report(tuned))


def test_the_run_of_most_tokens_stays_the_headline(evaluated, tmp_path):
    from glq.report import add_scores

    report = read_report(evaluated[0])
    (entry,) = report["scores"]
    few = add_scores(report, [entry | {"tokens": 63, "kl": 7.5}])
    assert f"{entry['kl']:.4f} KL, nats a token" in page(render_report(few))
    assert "7.5000" in render_report(few)  # in the table
    assert "7.5000" not in render_card(few)
    other = add_scores(report, [entry | {"text_sha256": "other", "kl": 7.5}])
    assert "7.5000" in render_card(other)  # as many: the latest


def test_names_are_text_and_never_markup(tiny_checkpoint):
    report = read_report(tiny_checkpoint) | {"name": "<script>alert(1)</script>"}
    html = render_report(report)
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "<script" not in render_comparison([report])
    assert "<b>" not in lines({"<b>": [1.0, 2.0]}, "x", "y")
    assert "<b>" not in heat({"<b>": [1.0]}, "x", "y")
    assert "<b>" not in scatter([("<b>", 1.0, 1.0)], "x", "y")


def test_a_card_carries_the_licence_over(checkpoint, tmp_path):
    original = tmp_path / "org-model"
    original.mkdir()
    front = (
        "---\nlicense: other\nlicense_name: gemma\nlicense_link: https://x.y/terms\nlanguage:\n- en\n- de\n---\n# M\n"
    )
    (original / "README.md").write_text(front)
    base = base_model(original)
    assert (base["license"], base["license_name"], base["name"]) == ("other", "gemma", "org-model")
    card = ModelCard(render_card(read_report(checkpoint) | {"base": base | {"on_hub": True, "name": "org/model"}}))
    data = card.data.to_dict()
    assert data["license"] == "other"
    assert data["license_link"] == "https://x.y/terms"
    assert data["language"] == ["en", "de"]
    assert data["base_model"] == "org/model"
    assert data["tags"] == ["glq"]
    assert "vllm serve" in card.content
    (original / "README.md").write_text("---\nlicense: mit\nmodel_name: Own\nbase_model: org/first\n---\n")
    local = ModelCard(render_card(read_report(checkpoint) | {"base": base_model(original)}))
    assert local.data.to_dict()["base_model"] == "org/first"
    assert local.data.to_dict()["license"] == "mit"
    assert "Own with its layers quantized" in local.content
    (original / "README.md").write_text("---\n: [\n---\n")
    assert base_model(original)["license"] is None
    plain = ModelCard((checkpoint / "README.md").read_text(encoding="utf-8"))
    assert "license" not in plain.data.to_dict()
    assert "look it up before you publish" in plain.content


@pytest.mark.parametrize("chat", [False, True])
def test_the_code_of_a_card_runs(chat, checkpoint, capsys):
    if chat:
        (checkpoint / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    report = read_report(checkpoint) | {"name": str(checkpoint)}
    card = render_card(report | {"base": report["base"] | {"chat": base_model(checkpoint)["chat"]}})
    assert ("apply_chat_template" in card) == chat
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = code.replace('device_map="auto"', 'device_map="cpu"').replace(
        "tokens = ", "model = model.dequantize()\ntokens = "
    )
    exec(compile(code, "card", "exec"), {})  # of a card that was just written
    assert len(capsys.readouterr().out.split()) > 40


def test_a_card_of_ones_own_stays(checkpoint):
    report = read_report(checkpoint)
    (checkpoint / "README.md").write_text("mine")
    write_pages(checkpoint, report)
    assert (checkpoint / "README.md").read_text() == "mine"
    (checkpoint / "README.md").unlink()
    write_pages(checkpoint, report)
    assert MARK in (checkpoint / "README.md").read_text(encoding="utf-8")


def test_compare_puts_quality_over_size(evaluated, checkpoint, tmp_path):
    out, html = evaluated[0], tmp_path / "compare.html"
    other = shutil.copytree(out, tmp_path / "other")
    report = read_report(other)
    report["name"], report["scores"][0]["kl"] = "other", 0.001
    write_pages(other, report)
    result = runner.invoke(app, ["compare", str(out), str(other), "--html", str(html)])
    assert result.exit_code == 0, result.output
    assert "0.0010" in result.output
    text = html.read_text(encoding="utf-8")
    assert text.count('class="dot') == 2
    assert "Not one judge" not in page(text)
    report["scores"][0]["text_sha256"] = "other"
    write_pages(other, report)
    result = runner.invoke(app, ["compare", str(out), str(other), str(checkpoint), "--html", str(html)])
    assert "not evaluated" in result.output
    assert "Not one judge" in page(html.read_text(encoding="utf-8"))


def test_what_is_no_report_is_refused(checkpoint, tmp_path):
    with pytest.raises(GlqError, match="has no report.json"):
        read_report(tmp_path)
    (checkpoint / "report.json").write_text('{"report_version": 99}')
    with pytest.raises(GlqError, match="has version 99, this glq reads 1"):
        read_report(checkpoint)
    (checkpoint / "report.json").write_text("[")
    result = runner.invoke(app, ["compare", str(checkpoint)])
    assert result.exit_code == 2
    assert "cannot be read" in result.stderr


def test_plots_stand_small_and_odd_data():
    assert lines({"a": [None, 0.0]}, "x", "y") == ""
    assert scatter([("a", 0.0, 1.0)], "x", "y") == ""
    assert "polyline" in lines({"a": [0.5]}, "x", "y")
    for svg in (lines({"a": [1e-6, 3.0, None, 2.0]}, "x", "y"), scatter([("a", 5.0, 1.0), ("b", 5.0, 1.0)], "x", "y")):
        numbers = [float(n) for n in re.findall(r'(?:cx|cy|x|y)="(-?[0-9.]+)"', svg)]
        assert all(0 <= n <= 720 for n in numbers)
