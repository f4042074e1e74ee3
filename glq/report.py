"""report.json: what a checkpoint is, how it was made and how good it is. rendering.py makes report.html of it."""

import json
import platform
import re
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from glq.checkpoint import read_config, summarize
from glq.errors import GlqError
from glq.files import read_json

REPORT = "report.json"
VERSION = 1
_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "numba", "cuda-core", "triton")


def make_report(
    path: Path,
    *,
    base: dict[str, Any],
    seconds: float,
    peak_bytes: int,
    device: str,
    tuned: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Of a checkpoint that was just written. base: what is known of the model before, `base_model` of publishing.py."""
    made = _read_json(path / "quantization.json")
    settings = made.get("settings", {})
    return {
        "report_version": VERSION,
        "name": path.name,
        "base": base,
        **_contents(path, made.get("errors", {})),
        "settings": settings,
        "seed": settings.get("seed"),
        "calibration_sha256": made.get("calibration_sha256"),
        "run": {"seconds": seconds, "peak_bytes": peak_bytes, "device": device, "tuned_kl": tuned},
        "versions": versions(),
        "scores": [],
    }


def _contents(path: Path, errors: dict[str, float]) -> dict[str, Any]:
    """What the files hold."""
    summary = summarize(path, read_config(path))
    layers = {
        name: {
            "codec": module.codec,
            "shape": [module.out_features, module.in_features],
            "weights": module.weights,
            "bits": summary.module_bits[name],
            "error": _mean_error(name, errors),
        }
        for name, module in summary.config.modules.items()
    }
    sizes = {
        key: getattr(summary, key) for key in ("file_bytes", "quantized_bytes", "quantized_weights", "other_bytes")
    }
    return {"bits": summary.bits, "sizes": sizes, "layers": layers}


def _mean_error(name: str, errors: dict[str, float]) -> float | None:
    """Of a layer, or of all the experts that an entry with * stands for."""
    if name in errors:
        return errors[name]
    pattern = re.compile(re.escape(name).replace(r"\*", r"\d+"))
    found = [error for key, error in errors.items() if pattern.fullmatch(key)]
    return sum(found) / len(found) if found else None


def versions() -> dict[str, str]:
    from glq import __version__

    found = {"glq": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read_report(path: str | Path) -> dict[str, Any]:
    """The report of a checkpoint directory; GlqError if it has none, or one of a newer glq."""
    file = Path(path) / REPORT
    if not Path(path).is_dir():
        raise GlqError(f"there is no directory {path}")
    if not file.is_file():
        raise GlqError(f"{path} has no {REPORT}: quantize the model with this version of glq, which writes one")
    report = _read_json(file)
    if report.get("report_version") != VERSION:
        raise GlqError(f"{file} has version {report.get('report_version')!r}, this glq reads {VERSION}")
    return report


def add_scores(report: dict[str, Any], scores: list[dict[str, Any]]) -> dict[str, Any]:
    """With these figures of `glq eval`; those on the same text and tokens are replaced."""
    new = {_judge(score) for score in scores}
    return report | {"scores": [s for s in report["scores"] if _judge(s) not in new] + scores}


def headline(report: dict[str, Any]) -> dict[str, Any] | None:
    """The figures that a page shows first: of the most tokens, and of those the latest."""
    return max(reversed(report["scores"]), key=lambda score: score["tokens"], default=None)


def _judge(score: dict[str, Any]) -> tuple[Any, ...]:
    return score["text_sha256"], score["tokens"], score["ctx"]


def score_entry(reference: Any, scored: Any, *, text_sha256: str, text: str, ctx: int) -> dict[str, Any]:
    """Of two evaluation.Scores, the reference's and the checkpoint's."""
    entry = asdict(scored) | {"reference_perplexity": reference.perplexity, "reference_bytes": reference.weight_bytes}
    return entry | {"text": text, "text_sha256": text_sha256, "ctx": ctx}


def after_tuning(report: dict[str, Any], name: str, before: float, after: float) -> dict[str, Any]:
    """Of the checkpoint that tuning wrote: what was measured before does not hold for it."""
    return report | {"name": name, "scores": [], "run": report["run"] | {"tuned_kl": (before, after)}}


def write_json(path: Path, report: dict[str, Any]) -> None:
    (path / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _read_json(file: Path) -> dict[str, Any]:
    content = read_json(file) if file.is_file() else {}
    if not isinstance(content, dict):
        raise GlqError(f"{file} is not what glq writes: an object was expected")
    return content
