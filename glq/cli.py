"""The command line: a thin skin over the functions of the package."""

import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from glq import __version__
from glq.arguments import (
    SHORTEST,
    format_bytes,
    parse_bytes,
    refuse_below,
    refuse_existing,
    refuse_no_model,
    refuse_no_text,
    refuse_no_window,
)
from glq.commands import doctor, evaluate, plan, publish, talk
from glq.commands.console import out as _out
from glq.commands.console import plain_errors as _plain_errors
from glq.commands.console import progress as _progress
from glq.commands.console import say as _say
from glq.commands.plan import Context, KvBits, Memory, choose, show_fit
from glq.errors import GlqError


class _ByUse(TyperGroup):
    """Commands in the order in which one needs them."""

    ORDER = ("doctor", "plan", "quantize", "info", "eval", "compare", "chat", "generate", "serve", "push", "tune")

    def list_commands(self, ctx: Any) -> list[str]:
        return [*self.ORDER, *(name for name in super().list_commands(ctx) if name not in self.ORDER)]


app = typer.Typer(cls=_ByUse, no_args_is_help=True, rich_markup_mode=None)


def _print_version(asked: bool) -> None:
    if asked:
        _out.print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def _main(
    _: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Make a language model's layers 4–8 times smaller with trellis codes and the E8 lattice."""


_Model = Annotated[str, typer.Argument(help="local model directory, or Hugging Face name")]
_Out = Annotated[Path, typer.Argument(help="directory to write; must not exist, or be empty")]
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
        float | None, typer.Option(help="bits a weight, 1.5 to 4; default: 3, or those of the codec or plan")
    ] = None,
    codec: Annotated[
        str, typer.Option(help="auto: the best at its rate; fast ones: e8-1.5, e8-2, nested-3, nested-3.5, nested-4")
    ] = "auto",
    layer: Annotated[
        list[str] | None, typer.Option(help="PATTERN=CODEC for layers whose names match; may be repeated")
    ] = None,
    embeddings: Annotated[float | None, typer.Option(help="bits of the embeddings; default: as they are")] = None,
    head: Annotated[float | None, typer.Option(help="bits of the lm_head; default: as it is")] = None,
    fit: Memory = None,
    context: Context = 4096,
    kv_bits: KvBits = None,
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
        bool, typer.Option("--side-by-side", help="round a block's matrices at once, for --devices or --ray to share")
    ] = False,
    ray: Annotated[str | None, typer.Option(help="Ray cluster that does the rounding: auto, or HOST:PORT")] = None,
    seed: _Seed = 0,
    restart: Annotated[bool, typer.Option("--restart", help="begin anew where a run was stopped")] = False,
    log_json: Annotated[Path | None, typer.Option(help="append a line of JSON for each step")] = None,
) -> None:
    """Quantize a model's decoder layers. The same command goes on where an earlier one was stopped."""

    def check() -> None:
        refuse_no_model(model)
        refuse_existing(out)
        refuse_no_text(calibration)
        refuse_no_window(tokens, ctx, least=SHORTEST)
        if fit is not None:
            parse_bytes(fit)
        if bits is not None and not 1.5 <= bits <= 4:
            raise GlqError(f"bits must lie between 1.5 and 4, found {bits:g}")
        if wrong := [entry for entry in layer or () if "=" not in entry]:
            raise GlqError(f"--layer takes PATTERN=CODEC, like '*.v_proj=nested-4', found {wrong[0]!r}")

    with _plain_errors(check):
        from glq.allocation import Plan
        from glq.codecs import get_codec
        from glq.machine import keep_large_tensors_off_the_heap
        from glq.pipeline import Settings
        from glq.recipe import goes_on
        from glq.recipe import quantize as run
        from glq.tuning import TuneSettings

        keep_large_tensors_off_the_heap()
        if fit is not None:
            named = None if codec == "auto" else codec
            fitted = choose(model, fit, context, kv_bits, bits, plan, embeddings, head, named)
            show_fit(fitted)
            bits, embeddings, head = fitted.best.bits, fitted.best.outside, fitted.best.outside
        planned = None if plan is None else Plan.read(plan)
        if bits is None and codec != "auto":
            bits = get_codec(codec).bits
        elif bits is None:
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
        with _progress(log_json, lambda: goes_on(out)) as listener:
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
                ray=ray,
                restart=restart,
                progress=listener,
            )
        tuned = "" if result.tuned is None else f", held-out KL {result.tuned[0]:.4f} → {result.tuned[1]:.4f}"
        _say(
            f"{result.path}: {result.bits:.3f} stored bits a weight, {format_bytes(result.file_bytes)}, "
            f"{result.seconds:.0f} s, peak memory {result.peak_bytes / 1e9:.2f} GB{tuned}"
        )
        if settings.embeddings is None and 4 * result.other_bytes > result.file_bytes:
            _say(
                f"{format_bytes(result.other_bytes)} of it stay in 16 bits, embeddings above all: "
                "--embeddings 4 --head 4 packs these, too"
            )
        if result.left:
            _say(_left(result.left))
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
        _say(f"{out / 'report.html'}: for your browser. Next: glq eval {out} --reference {model}; glq chat {out}")


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
    with _plain_errors(lambda: refuse_below(1, max_tokens=max_tokens)):
        from transformers import TextStreamer

        from glq.hf_integration import load
        from glq.hub import load_tokenizer, resolve
        from glq.kv.cache import GlqCache, cache_keyword
        from glq.kv.codec import kv_codec

        if kv_bits is not None:
            kv_codec(kv_bits)  # refused before anything is loaded
        tokenizer = load_tokenizer(resolve(model))
        if chat and not tokenizer.chat_template:
            raise GlqError(f"{model} has no chat template: leave out --chat")
        if chat:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
        if not inputs["input_ids"].numel():
            raise GlqError("the prompt is empty: give a text to go on from")
        loaded = load(model, device=device)
        streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
        cache = {} if kv_bits is None else {cache_keyword(loaded): GlqCache(kv_bits, model=loaded)}
        loaded.generate(
            **inputs.to(loaded.device), max_new_tokens=max_tokens, do_sample=False, streamer=streamer, **cache
        )


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
        from glq.checkpoint import inspect, is_upstream_checkpoint
        from glq.vllm_integration.shares import checkpoint_shares

        if is_upstream_checkpoint(model):
            _info_upstream(model, as_json)
            return
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
            f"files: {summary.file_bytes:,} bytes, all of them checked",
            highlight=False,
            soft_wrap=True,
        )
        for rank, share in enumerate(held):
            _say(f"rank {rank} of {tp}: {share.packed:,} bytes quantized + {share.other:,} other = {share.total:,}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="checkpoint of upstream glq 0.1 – 0.8: directory or name")],
    out: _Out,
    dense: Annotated[bool, typer.Option("--dense", help="write plain 16-bit weights, which any program reads")] = False,
) -> None:
    """Rewrite a checkpoint of upstream glq; without --dense, say why its codes cannot be kept."""
    with _plain_errors():
        from glq.upstream.convert import convert as run

        with _progress() as listener:
            done = run(source, out, dense=dense, progress=listener)
        _say(f"{done}: {sum(f.stat().st_size for f in done.glob('*.safetensors')):,} bytes of plain weights")


@app.command()
def version() -> None:
    """Print the version."""
    _out.print(__version__, highlight=False)


app.command("plan")(plan.plan)
app.command("doctor")(doctor.doctor)
app.command("eval")(evaluate.evaluate)
app.command("compare")(publish.compare)
app.command("push")(publish.push)
app.command("chat")(talk.chat)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(talk.serve)


def _left(layers: dict[str, str]) -> str:
    """Which linear layers were not quantized: each by its name if they are few."""
    if len(layers) <= 3:
        return "in their own precision stay: " + "; ".join(f"{name}, which {why}" for name, why in layers.items())
    reasons = Counter(layers.values()).most_common()
    counts = "; ".join(f"{count}, each of which {reason}" for reason, count in reasons)
    return f"{len(layers)} linear layers stay in their own precision: {counts}. quantization.json names them"


def _info_upstream(model: Path, as_json: bool) -> None:
    from glq.upstream.convert import inspect_upstream

    found = inspect_upstream(model)
    if as_json:
        sys.stdout.write(json.dumps({"bits": found.bits, **asdict(found)}, indent=2) + "\n")
        return
    table = Table(f"upstream glq, {found.codebook}", "layers")
    for kind, count in found.layers.items():
        table.add_row(kind, str(count))
    _out.print(table)
    _say(
        f"quantized: {found.nbytes:,} bytes × 8 ÷ {found.weights:,} weights = {found.bits:.4f} bits; "
        f"other tensors: {found.other_bytes:,} bytes"
    )
