"""Benchmarks of lm-evaluation-harness for any checkpoint that transformers loads, which [eval] brings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glq.errors import GlqError, how_to_install
from glq.hf_integration import load
from glq.hub import load_tokenizer, resolve


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task, as the harness names them; stderr is None where it gives none."""

    task: str
    metric: str
    value: float
    stderr: float | None


def run_tasks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    device: str = "auto",
    batch: int = 1,
    shots: int | None = None,
    limit: int | None = None,
    folder: Path | None = None,
) -> list[TaskScore]:
    """Score a model on tasks by name. limit: examples of each; folder: with task files (YAML) of one's own.

    GlqError if the harness is not installed, or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise GlqError(f"tasks need lm-evaluation-harness ({error.name}): {how_to_install('eval')}") from error
    manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise GlqError(f"lm-evaluation-harness knows no task {', '.join(unknown)}: `lm_eval ls tasks` lists all")
    loaded = load(model, device=device)
    wrapped = HFLM(pretrained=loaded, tokenizer=load_tokenizer(resolve(model)), batch_size=batch)
    try:
        found = simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
        )
    except (OSError, ConnectionError) as error:
        raise GlqError(f"a task's data cannot be had: {str(error).strip().splitlines()[0][:200]}") from error
    return [score for task, metrics in found["results"].items() for score in _scores(task, metrics)]


def _scores(task: str, metrics: dict[str, Any]) -> list[TaskScore]:
    """Metrics are named "acc,none", their standard errors "acc_stderr,none"."""
    scores = []
    for key, value in metrics.items():
        name, comma, kind = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, int | float):
            error = metrics.get(f"{name}_stderr,{kind}")
            label = name if kind == "none" else f"{name} ({kind})"
            scores.append(
                TaskScore(task, label, float(value), float(error) if isinstance(error, int | float) else None)
            )
    return scores
