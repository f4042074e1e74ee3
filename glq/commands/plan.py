"""`glq plan`: which rate fits, and which layers get how many bits."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from glq.arguments import SHORTEST, format_bytes, parse_bytes, refuse_no_model, refuse_no_text, refuse_no_window
from glq.commands.console import err, plain_errors, progress, say
from glq.commands.console import out as console
from glq.errors import GlqError

if TYPE_CHECKING:
    from glq.allocation import Plan
    from glq.fitting import Fit
    from glq.footprint import Footprint

Memory = Annotated[str | None, typer.Option("--fit", help="memory to fit into, weights, KV cache and all: 12GB")]
Context = Annotated[int, typer.Option(help="with --fit: tokens, prompt and answer")]
KvBits = Annotated[int | None, typer.Option(help="with --fit: bits of the KV cache, 4, 3 or 2; default: 16")]


def plan(
    model: Annotated[str, typer.Argument(help="local model directory, or Hugging Face name")],
    out: Annotated[Path | None, typer.Argument(help="JSON file to write; with --fit it may be left out")] = None,
    bits: Annotated[float | None, typer.Option(help="bits a weight, 1.5 to 4; default: 3, or what fits")] = None,
    fit: Memory = None,
    context: Context = 4096,
    kv_bits: KvBits = None,
    calibration: Annotated[Path | None, typer.Option(help="UTF-8 text; default: the one that glq ships")] = None,
    tokens: Annotated[int | None, typer.Option(help="calibration tokens; default: 6,144 (GPU: 73,728)")] = None,
    ctx: Annotated[int, typer.Option(help="tokens in one calibration window")] = 1024,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    seed: Annotated[int, typer.Option(help="of the random rotation")] = 0,
    measured: Annotated[
        Path | None, typer.Option(help="an older plan of this model: take its sensitivities, good for every rate")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the plan here, too (PNG, SVG, PDF)")] = None,
) -> None:
    """Which rate fits into a memory (--fit), or which layers get how many bits: for `glq quantize --plan`."""

    def check() -> None:
        refuse_no_model(model)
        refuse_no_text(calibration)
        refuse_no_window(tokens, ctx, least=SHORTEST)
        if fit is not None:
            parse_bytes(fit)
        if out is None and fit is None:
            raise GlqError("glq plan writes a JSON file: name one, or say what to fit into, --fit 12GB")

    with plain_errors(check):
        from glq.allocation import Plan, allocate, make_plan
        from glq.pipeline import Settings

        if fit is not None:
            fitted = choose(model, fit, context, kv_bits, bits)
            show_fit(fitted)
            bits = fitted.best.bits
            if out is None:
                return
        assert out is not None
        if out.exists():
            raise GlqError(f"{out} exists: nothing is overwritten, name another file")
        bits = 3 if bits is None else bits
        if measured is not None:
            made = allocate(Plan.read(measured).groups, bits)
        else:
            settings = Settings(bits=bits, tokens=tokens, ctx=ctx, seed=seed)
            with progress() as listener:
                made = make_plan(model, bits, settings, calibration=calibration, device=device, progress=listener)
        made.write(out)
        _show_plan(made)
        if plot is not None:
            from glq.plots import plot_plan

            plot_plan(made, plot)


def choose(model: str, memory: str, context: int, kv_bits: int | None, *given: object) -> "Fit":
    """What fits; GlqError if a rate was asked for as well."""
    from glq.fitting import fit
    from glq.kv.codec import kv_codec

    if any(value is not None for value in given):
        raise GlqError("--fit chooses the bits of layers, embeddings and lm_head: leave these out, or leave out --fit")
    if kv_bits is not None:
        kv_codec(kv_bits)  # refused before the model is read
    with err.status("counting what every rate takes"):
        return fit(model, parse_bytes(memory), context, kv_bits)


def show_fit(fitted: "Fit") -> None:
    """Every rate with its bytes, and what to run."""
    table = Table("bits", "embeddings, head", "weights, GB", "KV cache", "activations", "together, GB", "")

    def add(bits: str, outside: int | None, part: "Footprint", chosen: bool) -> None:
        figures = [f"{n / 1e9:.3f}" for n in (part.weights, part.kv, part.activations, part.total)]
        verdict = "fits" if fitted.fits(part) else ""
        verdict = "[bold]taken[/bold]" if chosen else verdict
        table.add_row(bits, "16" if outside is None else str(outside), *figures, verdict)

    add("16", None, fitted.plain, False)
    for option in fitted.options:
        if option.outside == fitted.best.outside:
            add(f"{option.bits:g}", option.outside, option.footprint, option == fitted.best)
    console.print(table)
    cache = "16-bit" if fitted.kv_bits is None else f"{fitted.kv_bits}-bit"
    say(
        f"GB for {fitted.context:,} tokens of one sequence, {cache} cache; {format_bytes(fitted.memory)} less 5% "
        "for CUDA itself"
    )
    if fitted.kv_bits is not None:
        say("activations: with what coding a prompt's keys and values takes, at most half a GB (docs/kv.md)")
    if fitted.original_fits:
        small = fitted.best.footprint.total < fitted.plain.total
        gain = "quantizing makes it smaller still:" if small else "and is smaller than what quantizing makes of it:"
        say(f"the original fits as it is, {gain}")
    say(fitted.command())
    if fitted.kv_bits is not None:
        say(f"glq generate OUT PROMPT --kv-bits {fitted.kv_bits}")


def _show_plan(made: "Plan") -> None:
    table = Table("layers", "weights", "KL a unit of MSE", "codec")
    for group, codec in zip(made.groups, made.codecs, strict=True):
        table.add_row(", ".join(group.layers), f"{group.weights:,}", f"{group.sensitivity:.4f}", codec)
    console.print(table)
