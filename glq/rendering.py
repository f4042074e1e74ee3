"""Pages of a report: report.html of one checkpoint, compare.html of several, README.md for the hub."""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from glq.arguments import format_bytes
from glq.charts import heat, lines, scatter
from glq.report import add_scores, headline, read_report, write_json

PAGE, CARD = "report.html", "README.md"
MARK = "<!-- written by glq: edits below are kept only if this line is removed -->"


def render_report(report: dict[str, Any]) -> str:
    """One checkpoint, self-contained."""
    kinds = _by_kind(report["layers"])
    bits = heat(_column(kinds, "bits"), "block", "bits")
    errors = _joined({name: row for name, row in _column(kinds, "error").items() if any(row)})
    plots = {"bits": bits, "errors": lines(errors, "block", "share of output energy lost"), "kinds": list(errors)}
    return _environment().get_template("report.html.j2").render(report=report, plots=plots, **_figures(report))


def render_comparison(reports: list[dict[str, Any]]) -> str:
    """Several, with a plot of quality over size."""
    rows = [{"name": r["name"], "bits": r["bits"], **_figures(r)} for r in reports]
    points = [(r["name"], r["size"] / 1e6, r["score"]["kl"]) for r in rows if r["score"]]
    plot = scatter(points, "MB of weight files", "KL, nats a token")
    alike = len({(r["score"]["text_sha256"], r["score"]["tokens"], r["score"]["ctx"]) for r in rows if r["score"]}) < 2
    return _environment().get_template("compare.html.j2").render(rows=rows, plot=plot, alike=alike)


def render_card(report: dict[str, Any]) -> str:
    """A model card for the hub, with its metadata."""
    figures, codecs = _figures(report), sorted({layer["codec"] for layer in report["layers"].values()})
    return _environment().get_template("card.md.j2").render(report=report, mark=MARK, codecs=codecs, **figures)


def write_pages(path: Path, report: dict[str, Any]) -> None:
    """report.json, report.html and README.md of a checkpoint; a README.md that is somebody's own stays."""
    write_json(path, report)
    (path / PAGE).write_text(render_report(report), encoding="utf-8")
    card = path / CARD
    if not card.exists() or MARK in card.read_text(encoding="utf-8", errors="replace"):
        card.write_text(render_card(report), encoding="utf-8")


def write_scores(path: Path, scores: list[dict[str, Any]]) -> None:
    """The figures of `glq eval` into the pages of a checkpoint."""
    write_pages(path, add_scores(read_report(path), scores))


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    """What every page tells: size, original size where it is known, the score of the most tokens."""
    original = report["base"].get("bytes")
    size = report["sizes"]["file_bytes"]
    return {
        "size": size,
        "original": original,
        "ratio": original / size if original else None,
        "score": headline(report),
    }


def _by_kind(layers: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any] | None]]:
    """Layers by what they are, over the blocks; what is in no block, embeddings and lm_head, is left to the table."""
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for name, layer in layers.items():
        if match := re.search(r"\.(\d+)\.(.+)$", name):
            rows.setdefault(match[2].replace("experts.*.", "experts "), {})[int(match[1])] = layer
    length = max((max(row) + 1 for row in rows.values()), default=0)
    return {kind.rpartition(".")[2] or kind: [row.get(i) for i in range(length)] for kind, row in rows.items()}


def _column(kinds: dict[str, list[dict[str, Any] | None]], key: str) -> dict[str, list[float | None]]:
    return {name: [None if layer is None else layer[key] for layer in row] for name, row in kinds.items()}


def _joined(rows: dict[str, list[float | None]]) -> dict[str, list[float | None]]:
    """Rows that are the same, as those of layers rounded as one matrix are, under all of their names."""
    names: dict[tuple[float | None, ...], list[str]] = {}
    for name, row in rows.items():
        names.setdefault(tuple(row), []).append(name)
    return {", ".join(alike): list(row) for row, alike in names.items()}


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("glq"),
        autoescape=select_autoescape(enabled_extensions=("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bytes"] = format_bytes
    environment.filters["figure"] = lambda x: f"{x:,.2f}" if x < 1e5 else f"{x:.2e}"
    environment.filters["duration"] = lambda s: f"{s:.0f} s" if s < 120 else f"{s / 60:.0f} min"
    return environment
