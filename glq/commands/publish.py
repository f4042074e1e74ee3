"""`glq compare` and `glq push`: what others see of a checkpoint."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from glq.commands.console import out as console
from glq.commands.console import plain_errors, say
from glq.errors import GlqError


def compare(
    models: Annotated[list[Path], typer.Argument(help="checkpoint directories, each with its report.json")],
    html: Annotated[Path, typer.Option(help="page to write, with a plot of quality over size")] = Path("compare.html"),
    as_json: Annotated[Path | None, typer.Option("--json", help="write the figures here too")] = None,
) -> None:
    """Several checkpoints side by side: sizes, and the figures of `glq eval`."""

    def check() -> None:
        for i, path in enumerate(models):
            if any(path.resolve() == other.resolve() for other in models[:i]):
                raise GlqError(f"{path} is named twice: a checkpoint is not compared with itself")

    with plain_errors(check):
        from glq.rendering import render_comparison
        from glq.report import read_report

        reports = [read_report(path) for path in models]
        table = Table("", "MB", "stored bits", "perplexity", "KL", "KL p99", "top-1")
        for report in reports:
            table.add_row(report["name"], *_figures(report))
        console.print(table)
        if not all(report["scores"] for report in reports):
            say("not evaluated: glq eval DIR --reference ORIGINAL")
        html.write_text(render_comparison(reports), encoding="utf-8")
        if as_json is not None:
            as_json.write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")
        say(f"{html}: the same with a plot")


def push(
    model: Annotated[Path, typer.Argument(help="checkpoint directory")],
    name: Annotated[str, typer.Argument(help="repository on the Hugging Face hub: you/model")],
    private: Annotated[bool, typer.Option("--private", help="for you alone, if the repository is new")] = False,
    message: Annotated[str | None, typer.Option(help="of the commit")] = None,
    endpoint: Annotated[str | None, typer.Option(help="another hub than huggingface.co")] = None,
) -> None:
    """Upload a checkpoint with its card and report to the Hugging Face hub, after checking every byte."""
    with plain_errors():
        from glq.publishing import push as run
        from glq.rendering import CARD, MARK, PAGE, write_pages
        from glq.report import REPORT, read_report

        if not model.is_dir():
            raise GlqError(f"there is no directory {model}")
        card = model / CARD
        if not card.is_file():
            raise GlqError(f"{model} has no {CARD}: quantize with this version of glq, or write a model card")
        before = {file: file.read_bytes() for file in (card, model / PAGE, model / REPORT) if file.is_file()}
        text = before[card].decode("utf-8", errors="replace")
        if MARK in text and "look it up before you publish" in text:
            say("the card states no licence: the original's directory had none")
        if MARK in text and "Not evaluated yet" in text:
            say(f"the card has no figures: glq eval {model} --reference ORIGINAL adds them")
        if model / REPORT in before:
            write_pages(model, read_report(model) | {"name": name})
        try:
            say(run(model, name, private=private, message=message, endpoint=endpoint))
        except BaseException:
            for file, content in before.items():  # nothing has that name
                file.write_bytes(content)
            raise


def _figures(report: dict[str, Any]) -> tuple[str, ...]:
    from glq.report import headline

    size = f"{report['sizes']['file_bytes'] / 1e6:.1f}"
    s = headline(report)
    if s is None:
        return size, f"{report['bits']:.3f}", "", "", "", ""
    quality = (f"{s['perplexity']:.2f}", f"{s['kl']:.4f}", f"{s['kl_p99']:.3f}", f"{s['top1']:.1%}")
    return (size, f"{report['bits']:.3f}", *quality)
