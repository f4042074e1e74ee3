"""`glq eval`."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from glq.commands.console import bar, out, plain_errors, say
from glq.errors import GlqError

if TYPE_CHECKING:
    from glq.evaluation import Score


def evaluate(
    models: Annotated[list[str], typer.Argument(help="checkpoints to score")],
    reference: Annotated[str, typer.Option(help="the model before quantization")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; default: the one that glq ships")] = None,
    tokens: Annotated[int, typer.Option(help="tokens to score")] = 16384,
    ctx: Annotated[int, typer.Option(help="tokens in one window")] = 1024,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here too")] = None,
) -> None:
    """Perplexity, KL divergence and top-1 agreement with the reference."""
    with plain_errors():
        from glq.evaluation import evaluate as run

        with bar() as shown:
            task = shown.add_task("evaluating", total=None)
            scores = run(
                reference,
                list(models),
                text=text,
                tokens=tokens,
                ctx=ctx,
                device=device,
                progress=lambda done, total: shown.update(task, completed=done, total=total),
            )
        table = Table("", "size", "stored bits", "perplexity", "KL", "KL p99", "top-1")
        rows = []
        for name, score in zip([reference, *models], scores, strict=True):
            bits = _stored_bits(name)
            rows.append({"model": str(name), "bits": bits, **asdict(score)})
            table.add_row(
                "reference" if not rows[1:] else str(name),
                f"{score.weight_bytes / 1e6:.1f} MB",
                "16" if bits is None else f"{bits:.3f}",
                f"{score.perplexity:.2f}",
                f"{score.kl:.4f}",
                f"{score.kl_p99:.3f}",
                f"{score.top1:.1%}",
            )
        if json_file is not None:
            json_file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        out.print(table)
        _record(list(models), scores, text, ctx)
        if any(score.nonfinite for score in scores):
            raise GlqError("some logits were NaN or infinite: see `nonfinite` in --json")


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
