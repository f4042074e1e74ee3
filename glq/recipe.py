"""From a model to a checkpoint: plan where layers differ, round, tune. What `glq quantize` does."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from glq.allocation import Plan, make_plan
from glq.arguments import refuse_existing
from glq.codecs import DEFAULT_CODECS
from glq.errors import GlqError
from glq.machine import describe, pick_device
from glq.pipeline import Result, Settings, round_model
from glq.progress import Listener, silent
from glq.publishing import base_model
from glq.rendering import write_pages
from glq.report import make_report
from glq.spread import pick_devices
from glq.tuning import TuneSettings, split_text, tune
from glq.unfinished import folder_of


def quantize(
    model: str | Path,
    out: str | Path,
    settings: Settings | None = None,
    *,
    calibration: str | Path | None = None,
    device: str = "auto",
    devices: Sequence[str] = (),
    ray: str | None = None,
    mixed: bool | None = None,
    plan: Plan | None = None,
    tuning: TuneSettings | None = None,
    restart: bool = False,
    progress: Listener = silent,
) -> Result:
    """Quantize a Hugging Face model directory (or hub name) into the checkpoint directory `out`.

    calibration: a UTF-8 text file; without one, a public-domain text that the package ships. devices: GPUs among which
    rounding is shared out, instead of `device`; the first does the rest, and the bytes are those of one alone. ray: the
    address of a Ray cluster that rounds instead, its machines like this one. mixed: let layers differ in their codecs,
    as measured; by default only at rates that no codec has (2.25, …). plan: use this one instead of measuring. tuning:
    train scales and norms afterwards. Raises GlqError before any work starts if the model, the text, the settings or
    `out` are not fit for it; nothing is overwritten. After a crash, Ctrl-C or a full disk, a call with the same
    arguments goes on at the last block that was finished; restart: begin anew. Beside the checkpoint lie report.html,
    report.json and a model card.
    """
    settings = settings or Settings(bits=3 if plan is None else plan.bits)
    if plan is not None and plan.bits != settings.bits:
        raise GlqError(
            f"the plan is for {plan.bits} bits, not {settings.bits}: ask for {plan.bits}, or let `glq plan --measured` "
            "allocate anew"
        )
    if mixed is None:
        mixed = settings.codec == "auto" and settings.bits not in DEFAULT_CODECS
    elif mixed and settings.codec != "auto":
        raise GlqError(f"mixed rates take codecs of their own: leave out either mixed or the codec {settings.codec!r}")
    if devices and device != "auto":
        raise GlqError(f"name either one device, {device!r}, or several, {','.join(devices)!r}")
    if devices and ray is not None:
        raise GlqError(f"rounding is shared out either to devices, {','.join(devices)!r}, or to a Ray cluster, {ray!r}")
    if devices:
        device = str(pick_devices(devices)[0])
    out = Path(out)
    refuse_existing(out)
    if tuning is not None:
        split_text(model, tuning, calibration, pick_device(device))  # refuses now what it would refuse in the end
    if plan is None and mixed:
        plan = make_plan(model, settings.bits, settings, calibration=calibration, device=device, progress=progress)
    kept = None
    if plan is not None:
        settings, kept = replace(settings, layers=(*plan.layers, *settings.layers)), plan.to_dict()
    into = out if tuning is None else _untuned(out)
    result = round_model(
        model,
        into,
        settings,
        plan=kept,
        calibration=calibration,
        device=device,
        devices=devices,
        ray=ray,
        restart=restart,
        progress=progress,
    )
    if tuning is not None:
        try:
            tuned = tune(into, out, model, tuning, text=calibration, device=device, progress=progress)
        finally:
            shutil.rmtree(into, ignore_errors=True)
        result = replace(result, path=out, seconds=result.seconds + tuned.seconds, tuned=(tuned.before, tuned.after))
    report = make_report(
        out,
        base=base_model(model),
        seconds=result.seconds,
        peak_bytes=result.peak_bytes,
        device=describe(pick_device(device)),
        tuned=result.tuned,
    )
    write_pages(out, report)
    return replace(result, **{key: report["sizes"][key] for key in ("file_bytes", "other_bytes")})


def goes_on(out: Path) -> bool:
    """Whether rounding that was stopped lies there, with which the same command goes on."""
    return any(folder_of(folder).exists() for folder in (out, _place_of_untuned(out)))


def _place_of_untuned(out: Path) -> Path:
    return out.absolute().parent / f".{out.name}.untuned"


def _untuned(out: Path) -> Path:
    """Where the checkpoint lies that is tuned then. One that is whole is of a run that was stopped while it tuned."""
    folder = _place_of_untuned(out)
    if folder.exists():
        shutil.rmtree(folder)
    return folder
