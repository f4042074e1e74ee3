"""The command line: a thin skin over the functions of the package."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from glq import __version__
from glq.errors import GlqError
from glq.progress import Listener
from glq.progress import Progress as Step

app = typer.Typer(
    help="Make a language model's layers 4–8 times smaller with trellis codes and the E8 lattice.", no_args_is_help=True
)
_err = Console(stderr=True)
_out = Console()


@contextmanager
def _plain_errors() -> Iterator[None]:
    """A GlqError is the user's to mend: its text, exit code 2, no traceback."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # ours is the only one
    try:
        yield
    except GlqError as error:
        _err.print(f"[red]glq:[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


_Model = Annotated[str, typer.Argument(help="local model directory, or Hugging Face name")]
_Out = Annotated[Path, typer.Argument(help="directory to write; must not exist, or be empty")]
_Bits = Annotated[float, typer.Option(help="bits a weight, any figure from 1.5 to 4")]
_Calibration = Annotated[Path | None, typer.Option(help="UTF-8 text; default: the one that glq ships")]
_Tokens = Annotated[int | None, typer.Option(help="calibration tokens; default: 16,384 (GPU: up to 262,144)")]
_Ctx = Annotated[int, typer.Option(help="tokens in one calibration window")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
_Seed = Annotated[int, typer.Option(help="of the random rotation")]


@app.command()
def quantize(
    model: _Model,
    out: _Out,
    bits: Annotated[
        float | None, typer.Option(help="bits a weight, any figure from 1.5 to 4; default: 3, or the plan's")
    ] = None,
    codec: Annotated[str, typer.Option(help="codec by name; auto takes the best at this rate")] = "auto",
    layer: Annotated[
        list[str] | None, typer.Option(help="PATTERN=CODEC for layers whose names match; may be repeated")
    ] = None,
    embeddings: Annotated[float | None, typer.Option(help="bits of the embeddings; default: as they are")] = None,
    head: Annotated[float | None, typer.Option(help="bits of the lm_head; default: as it is")] = None,
    mixed: Annotated[
        bool | None,
        typer.Option("--mixed/--uniform", help="let layers differ; default: at rates that no codec has"),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="a plan of `glq plan`, edited or not")] = None,
    tp: Annotated[int, typer.Option(help="tensor-parallel ranks that the checkpoint can be served on")] = 1,
    tune: Annotated[
        bool, typer.Option("--tune", help="train scales and norms towards the original afterwards")
    ] = False,
    calibration: _Calibration = None,
    tokens: _Tokens = None,
    ctx: _Ctx = 1024,
    device: _Device = "auto",
    devices: Annotated[str | None, typer.Option(help="GPUs that share the rounding: 0,1 or cuda:0,cuda:1")] = None,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="round a block's matrices at once, for --devices to share out")
    ] = False,
    seed: _Seed = 0,
    restart: Annotated[bool, typer.Option("--restart", help="begin anew where a run was stopped")] = False,
    log_json: Annotated[Path | None, typer.Option(help="append a line of JSON for each step")] = None,
) -> None:
    """Quantize a model's decoder layers. The same command goes on where an earlier one was stopped."""
    with _plain_errors():
        from glq.allocation import Plan
        from glq.machine import keep_large_tensors_off_the_heap
        from glq.pipeline import Settings
        from glq.recipe import quantize as run
        from glq.tuning import TuneSettings

        keep_large_tensors_off_the_heap()
        if wrong := [entry for entry in layer or () if "=" not in entry]:
            raise GlqError(f"--layer takes PATTERN=CODEC, like '*.v_proj=nested-4', found {wrong[0]!r}")
        planned = None if plan is None else Plan.read(plan)
        if bits is None:
            bits = 3 if planned is None else planned.bits
        exceptions = tuple((pattern, name) for pattern, _, name in (entry.partition("=") for entry in layer or ()))
        settings = Settings(
            bits,
            codec,
            exceptions,
            tokens=tokens,
            ctx=ctx,
            seed=seed,
            embeddings=embeddings,
            head=head,
            tensor_parallel=tp,
            side_by_side=side_by_side,
        )
        with _progress(log_json) as listener:
            result = run(
                model,
                out,
                settings,
                mixed=mixed,
                plan=planned,
                tuning=TuneSettings(ctx=ctx, seed=seed) if tune else None,
                calibration=calibration,
                device=device,
                devices=devices.split(",") if devices else (),
                restart=restart,
                progress=listener,
            )
        tuned = "" if result.tuned is None else f", held-out KL {result.tuned[0]:.4f} → {result.tuned[1]:.4f}"
        _say(
            f"{result.path}: {result.bits:.3f} stored bits a weight, {result.seconds:.0f} s, "
            f"peak memory {result.peak_bytes / 1e9:.2f} GB{tuned}"
        )
        for name, found in list(result.findings.items())[:5]:
            _say(f"{name}: {'; '.join(found)}")
        if len(result.findings) > 5:
            _say(f"quantization.json has {len(result.findings) - 5} more findings like these")
        if result.unreached:
            name, tokens = min(result.unreached.items(), key=lambda item: item[1])
            _say(
                f"{len(result.unreached)} experts read few of the calibration tokens, least {name} ({tokens}), and "
                "were rounded for what their layer reads on average more than for their own. --tokens takes more; "
                "quantization.json has all counts"
            )


@app.command("plan")
def plan_command(
    model: _Model,
    out: Annotated[Path, typer.Argument(help="JSON file to write")],
    bits: _Bits = 3,
    calibration: _Calibration = None,
    tokens: _Tokens = None,
    ctx: _Ctx = 1024,
    device: _Device = "auto",
    seed: _Seed = 0,
    measured: Annotated[
        Path | None, typer.Option(help="an older plan of this model: take its sensitivities, good for every rate")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the plan here, too (PNG, SVG, PDF)")] = None,
) -> None:
    """Measure how much each group of layers matters, and allocate bits: for `glq quantize --plan`."""
    with _plain_errors():
        from glq.allocation import Plan, allocate, make_plan
        from glq.pipeline import Settings

        if out.exists():
            raise GlqError(f"{out} exists: nothing is overwritten, name another file")
        if measured is not None:
            plan = allocate(Plan.read(measured).groups, bits)
        else:
            settings = Settings(bits=bits, tokens=tokens, ctx=ctx, seed=seed)
            with _progress() as listener:
                plan = make_plan(model, bits, settings, calibration=calibration, device=device, progress=listener)
        plan.write(out)
        table = Table("layers", "weights", "KL a unit of MSE", "codec")
        for group, codec in zip(plan.groups, plan.codecs, strict=True):
            table.add_row(", ".join(group.layers), f"{group.weights:,}", f"{group.sensitivity:.4f}", codec)
        _out.print(table)
        if plot is not None:
            from glq.plots import plot_plan

            plot_plan(plan, plot)


@app.command("tune")
def tune_command(
    checkpoint: Annotated[Path, typer.Argument(help="glq checkpoint directory")],
    out: _Out,
    reference: Annotated[str, typer.Option(help="the model before quantization")],
    text: _Calibration = None,
    steps: Annotated[int | None, typer.Option(help="of the optimizer; default: 100 on a CPU, 600 on a GPU")] = None,
    batch: Annotated[int | None, typer.Option(help="windows a step; default: 2 on a CPU, 8 on a GPU")] = None,
    ctx: _Ctx = 1024,
    sampled: Annotated[
        int | None, typer.Option(help="windows that the original writes itself; default: none on a CPU, 1,024 on a GPU")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="of AdamW, relative to a parameter's size")] = 1e-3,
    device: _Device = "auto",
    seed: Annotated[int, typer.Option(help="of the order of the windows")] = 0,
) -> None:
    """Train a checkpoint's scales, norms and biases towards the original's predictions, on your own text."""
    with _plain_errors():
        from glq.tuning import TuneSettings
        from glq.tuning import tune as run

        settings = TuneSettings(steps, batch, sampled, ctx, learning_rate, seed=seed)
        with _progress() as listener:
            result = run(checkpoint, out, reference, settings, text=text, device=device, progress=listener)
        _say(
            f"{out}: held-out KL {result.before:.4f} → {result.after:.4f} at step {result.step}, {result.seconds:.0f} s"
        )


@app.command("eval")
def evaluate_command(
    models: Annotated[list[str], typer.Argument(help="checkpoints to score")],
    reference: Annotated[str, typer.Option(help="the model before quantization")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; default: the one that glq ships")] = None,
    tokens: Annotated[int, typer.Option(help="tokens to score")] = 16384,
    ctx: Annotated[int, typer.Option(help="tokens in one window")] = 1024,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here too")] = None,
) -> None:
    """Perplexity, KL divergence and top-1 agreement with the reference."""
    with _plain_errors():
        from glq.evaluation import evaluate

        with _bar() as bar:
            task = bar.add_task("evaluating", total=None)
            scores = evaluate(
                reference,
                list(models),
                text=text,
                tokens=tokens,
                ctx=ctx,
                device=device,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
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
        _out.print(table)
        if any(score.nonfinite for score in scores):
            raise GlqError("some logits were NaN or infinite: see `nonfinite` in --json")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="checkpoint directory or name")],
    prompt: Annotated[str, typer.Argument(help="text to go on from")],
    max_tokens: Annotated[int, typer.Option(help="new tokens at most")] = 100,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    chat: Annotated[bool, typer.Option(help="wrap the prompt in the model's chat template")] = False,
    kv_bits: Annotated[
        int | None, typer.Option(help="bits of the KV cache: 4, 3 or 2; default: the model's own 16 or 32")
    ] = None,
) -> None:
    """Complete a prompt, greedily."""
    with _plain_errors():
        from transformers import TextStreamer

        from glq.hf_integration import load
        from glq.hub import load_tokenizer, resolve
        from glq.kv.cache import GlqCache
        from glq.kv.codec import kv_codec

        if kv_bits is not None:
            kv_codec(kv_bits)  # refused before anything is loaded
        loaded = load(model, device=device)
        tokenizer = load_tokenizer(resolve(model))
        if chat and not tokenizer.chat_template:
            raise GlqError(f"{model} has no chat template: leave out --chat")
        if chat:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(loaded.device)
        streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
        cache = None if kv_bits is None else GlqCache(kv_bits, config=loaded.config)
        loaded.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, streamer=streamer, past_key_values=cache)


@app.command()
def info(
    model: Annotated[Path, typer.Argument(help="checkpoint directory")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    tp: Annotated[
        int | None, typer.Option(help="and what each of so many tensor-parallel ranks of vLLM holds of it")
    ] = None,
) -> None:
    """What a checkpoint stores, counted from its files; checks them all."""
    with _plain_errors():
        from glq.checkpoint import inspect
        from glq.vllm_integration.shares import checkpoint_shares

        summary = inspect(model)
        held = [] if tp is None else checkpoint_shares(model, tp)
        content = {
            "bits": summary.bits,
            "file_bytes": summary.file_bytes,
            "quantized_bytes": summary.quantized_bytes,
            "quantized_weights": summary.quantized_weights,
            "other_bytes": summary.other_bytes,
            "glq_version": summary.config.version,
            "layers": {
                name: {"bits": bits, **summary.config.modules[name].to_dict()}
                for name, bits in summary.module_bits.items()
            },
        }
        if tp is not None:
            content["ranks"] = [asdict(share) for share in held]
        if as_json:
            sys.stdout.write(json.dumps(content, indent=2) + "\n")
            return
        table = Table("codec", "layers", "weights", "stored bytes", "stored bits a weight")
        for codec in sorted({m.codec for m in summary.config.modules.values()}):
            names = [name for name, m in summary.config.modules.items() if m.codec == codec]
            weights = sum(summary.config.modules[name].weights for name in names)
            nbytes = sum(summary.module_bits[name] * summary.config.modules[name].weights for name in names) / 8
            layers = sum(summary.config.modules[name].experts or 1 for name in names)
            table.add_row(codec, str(layers), f"{weights:,}", f"{nbytes:,.0f}", f"{8 * nbytes / weights:.4f}")
        _out.print(table)
        _out.print(
            f"quantized: {summary.quantized_bytes:,} bytes × 8 ÷ {summary.quantized_weights:,} weights = "
            f"{summary.bits:.4f} bits; other tensors: {summary.other_bytes:,} bytes; "
            f"files: {summary.file_bytes:,} bytes",
            highlight=False,
            soft_wrap=True,
        )
        for rank, share in enumerate(held):
            _say(f"rank {rank} of {tp}: {share.packed:,} bytes quantized + {share.other:,} other = {share.total:,}")


@app.command()
def version() -> None:
    """Print the version."""
    _out.print(__version__, highlight=False)


def _say(line: str) -> None:
    _out.print(line, highlight=False, soft_wrap=True)


@contextmanager
def _progress(log: Path | None = None) -> Iterator[Listener]:
    """A bar for each stage of long work, on a terminal; and a file of JSON lines."""
    from glq.machine import peak_memory
    from glq.progress import JsonLog

    try:
        file = None if log is None else log.open("a", encoding="utf-8")
    except OSError as error:
        raise GlqError(f"cannot write {log}: {error.strerror}") from error
    with _bar() as bar, file or nullcontext():
        tasks: dict[str, TaskID] = {}
        written = None if file is None else JsonLog(file)

        def show(step: Step) -> None:
            if step.stage not in tasks:
                tasks[step.stage] = bar.add_task(step.stage, total=step.total)
            text = f"{step.stage} {step.note}  {peak_memory() / 1e9:.1f} GB"
            bar.update(tasks[step.stage], completed=step.done, total=step.total, description=text)
            if written is not None:
                written(step)

        yield show


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=_err, disable=not _err.is_terminal)


def _stored_bits(model: str) -> float | None:
    """Stored bits a quantized weight of a glq checkpoint; None for any other model."""
    from glq.checkpoint import read_config, summarize

    try:
        return summarize(Path(model), read_config(Path(model))).bits
    except GlqError:
        return None
