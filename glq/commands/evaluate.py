"""`glq eval`."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from glq.arguments import refuse_below, refuse_no_model, refuse_no_text, refuse_no_window
from glq.commands.console import out, plain_errors, progress, say
from glq.errors import GlqError

if TYPE_CHECKING:
    from glq.evaluation import Score


def evaluate(
    models: Annotated[list[str], typer.Argument(help="checkpoints to score, of glq or any that transformers loads")],
    reference: Annotated[str | None, typer.Option(help="the model before quantization")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; default: the one that glq ships")] = None,
    tokens: Annotated[int, typer.Option(help="tokens to score")] = 16384,
    ctx: Annotated[int, typer.Option(help="tokens in one window")] = 1024,
    tasks: Annotated[str | None, typer.Option(help="of lm-evaluation-harness: hellaswag,arc_easy")] = None,
    shots: Annotated[int | None, typer.Option(help="with --tasks: examples in the prompt")] = None,
    limit: Annotated[int | None, typer.Option(help="with --tasks: examples of each, at most")] = None,
    task_dir: Annotated[Path | None, typer.Option(help="with --tasks: folder of tasks of your own")] = None,
    batch: Annotated[int, typer.Option(help="with --tasks: sequences at once")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here too")] = None,
) -> None:
    """Perplexity, KL divergence and top-1 agreement with the reference; benchmarks with --tasks."""

    def check() -> None:
        for name in (*models, reference):
            if name is not None:
                refuse_no_model(name)
        refuse_no_text(text)
        refuse_no_window(tokens, ctx)
        refuse_below(1, limit=limit, batch=batch)
        refuse_below(0, shots=shots)
        if json_file is not None and not json_file.parent.is_dir():
            raise GlqError(f"there is no directory {json_file.parent} for --json")
        if reference is None and tasks is None:
            raise GlqError("name the model before quantization, --reference, or benchmarks, --tasks hellaswag")

    with plain_errors(check):
        rows: list[dict[str, Any]] = [{"model": name} for name in ([reference] if reference else []) + models]
        if reference is not None:
            scores = _text_scores(reference, models, text, tokens, ctx, device)
            for row, score in zip(rows, scores, strict=True):
                row |= {"bits": _stored_bits(row["model"]), **asdict(score)}
            _show_scores(rows)
            _record(models, scores, text, ctx)
        if tasks is not None:
            from glq.harness import run_tasks

            names = [task.strip() for task in tasks.split(",") if task.strip()]
            options: dict[str, Any] = {"batch": batch, "shots": shots, "limit": limit, "folder": task_dir}
            for row in rows:
                found = run_tasks(row["model"], names, device=device, **options)
                row["tasks"] = [asdict(score) for score in found]
            _show_tasks(rows)
        if json_file is not None:
            json_file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        if any(row.get("nonfinite") for row in rows):
            raise GlqError("some logits were NaN or infinite: see `nonfinite` in --json")


def _text_scores(
    reference: str, models: list[str], text: Path | None, tokens: int, ctx: int, device: str
) -> "list[Score]":
    from glq.evaluation import evaluate as run
    from glq.progress import Progress

    with progress() as show:
        return run(
            reference,
            list(models),
            text=text,
            tokens=tokens,
            ctx=ctx,
            device=device,
            progress=lambda done, total: show(Progress("evaluating", done, total, f"of {ctx} tokens")),
        )


def _show_scores(rows: list[dict[str, Any]]) -> None:
    table = Table("", "size", "stored bits", "perplexity", "KL", "KL p99", "top-1")
    for i, row in enumerate(rows):
        table.add_row(
            row["model"] if i else "reference",
            f"{row['weight_bytes'] / 1e6:.1f} MB",
            "16" if row["bits"] is None else f"{row['bits']:.3f}",
            f"{row['perplexity']:.2f}",
            f"{row['kl']:.4f}",
            f"{row['kl_p99']:.3f}",
            f"{row['top1']:.1%}",
        )
    out.print(table)


def _show_tasks(rows: list[dict[str, Any]]) -> None:
    """A row for each metric, a column for each model."""
    table = Table("task", "metric", *(row["model"] for row in rows))
    for scores in zip(*(row["tasks"] for row in rows), strict=True):
        cells = [f"{s['value']:.4f}" + (f" ± {s['stderr']:.4f}" if s["stderr"] else "") for s in scores]
        table.add_row(scores[0]["task"], scores[0]["metric"], *cells)
    out.print(table)


def _record(models: list[str], scores: "list[Score]", text: Path | None, ctx: int) -> None:
    """Put the figures into the reports and cards of checkpoints that have them, and can be written to."""
    from glq.calibration import read_text
    from glq.rendering import PAGE, write_scores
    from glq.report import REPORT, score_entry

    digest = hashlib.sha256(read_text(text, default="evaluation").encode()).hexdigest()
    name = "the text that glq ships" if text is None else text.name
    for model, score in zip(models, scores[1:], strict=True):
        path = Path(model)
        if (path / REPORT).is_file() and os.access(path, os.W_OK):
            write_scores(path, [score_entry(scores[0], score, text_sha256=digest, text=name, ctx=ctx)])
            say(f"{path / PAGE}, and its card: figures added")


def _stored_bits(model: str) -> float | None:
    """Stored bits a quantized weight of a glq checkpoint; None for any other model."""
    from glq.checkpoint import is_upstream_checkpoint, read_config, summarize

    try:
        if is_upstream_checkpoint(Path(model)):
            from glq.upstream.convert import inspect_upstream

            return inspect_upstream(model).bits
        return summarize(Path(model), read_config(Path(model))).bits
    except GlqError:
        return None
