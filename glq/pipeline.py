"""The pipeline: calibration → rotation → rounding → checkpoint, one decoder block at a time."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glq import __version__
from glq.arguments import SHORTEST, refuse_no_window
from glq.calibration import Group, microbatches, read_text, walk, windows
from glq.cluster import workers_of
from glq.codecs import CODECS, DEFAULT_CODECS, get_codec
from glq.codecs.packing import TILE_COLS
from glq.config import GlqConfig
from glq.discovery import Call, capture, copied, final_states, look_ahead, run_block
from glq.embedding import embedding_scale
from glq.errors import GlqError
from glq.files import INDEX
from glq.findings import of_states
from glq.hub import load_tokenizer, resolve
from glq.machine import available_memory, peak_memory, pick_device, release_memory
from glq.moments import PRIOR, Moments, moments_of
from glq.preflight import needs, refuse_unfit, refuse_unwritable
from glq.progress import Listener, Progress, silent
from glq.rounder import Choice, GroupRounder
from glq.source import SourceModel
from glq.spill import Spill, host_copies
from glq.spread import pick_devices
from glq.writer import CheckpointWriter

_TOKENS = {"cpu": 16384, "cuda": 262144}  # at most, where the settings do not say
_COPIED = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*")


def check_bits(bits: float) -> None:
    """GlqError for a rate beyond those of the codecs, which mixing cannot reach either."""
    if not min(DEFAULT_CODECS) <= bits <= max(DEFAULT_CODECS):
        raise GlqError(f"bits must lie between {min(DEFAULT_CODECS)} and {max(DEFAULT_CODECS)}, found {bits}")


def rate_codec(bits: float) -> str:
    """The best codec of this rate. GlqError if there is none."""
    if bits not in DEFAULT_CODECS:
        raise GlqError(f"embeddings and head take one of {', '.join(map(str, DEFAULT_CODECS))} bits, found {bits}")
    return DEFAULT_CODECS[bits]


@dataclass(frozen=True)
class Settings:
    """What a quantization depends on, besides the model: the same settings and device give the same bytes."""

    bits: float = 3
    codec: str = "auto"  # or a name in CODECS
    layers: tuple[tuple[str, str], ...] = ()  # (pattern of layer names, codec): exceptions, the last that matches holds
    tokens: int | None = None  # of calibration; None: 16,384, on a GPU up to 262,144
    ctx: int = 1024
    seed: int = 0
    damping: float = 0.1
    embeddings: float | None = None  # bits of the input embeddings, one of DEFAULT_CODECS; None: as they are
    head: float | None = None  # bits of the lm_head; where it is tied to the embeddings, either of the two means both
    tensor_parallel: int = 1  # ranks that the input of row-parallel layers can be cut for
    side_by_side: bool = False  # a block's matrices do not wait for each other: each is rounded as if it were the first

    def __post_init__(self) -> None:
        if self.codec == "auto":
            check_bits(self.bits)
        elif get_codec(self.codec).bits != self.bits:
            own = f"{CODECS[self.codec].bits:g}"
            raise GlqError(f"codec {self.codec!r} stores {own} bits, not {self.bits:g}: ask for {own} (--bits {own})")
        for _, codec in self.layers:
            get_codec(codec)
        for bits in (self.embeddings, self.head):
            if bits is not None:
                rate_codec(bits)
        if self.tensor_parallel < 1:
            raise GlqError(f"tensor-parallel ranks must be at least 1, found {self.tensor_parallel}")
        refuse_no_window(self.tokens, self.ctx, least=SHORTEST)

    def codec_of(self, layer: str) -> str:
        """The codec of a layer by its full name. GlqError if no codec has this rate and the layer is not named."""
        for pattern, codec in reversed(self.layers):
            if _matches(layer, pattern):
                return codec
        if self.codec != "auto":
            return self.codec
        if self.bits not in DEFAULT_CODECS:
            raise GlqError(f"no codec has {self.bits} bits, and the plan does not name {layer}: plan this model anew")
        return DEFAULT_CODECS[self.bits]


@dataclass(frozen=True)
class Result:
    """What a quantization did."""

    path: Path
    bits: float  # stored, all included
    seconds: float
    peak_bytes: int  # resident memory of the process at its highest
    errors: dict[str, float]  # share of each layer's output energy that rounding lost, on the calibration text
    tuned: tuple[float, float] | None = None  # KL on held-out text before and after tuning
    unreached: dict[str, int] = field(default_factory=dict)  # experts that the calibration hardly reached: its tokens
    left: dict[str, str] = field(default_factory=dict)  # matrices that stay as they are, and why
    findings: dict[str, list[str]] = field(default_factory=dict)  # what could be wrong, by layers' or blocks' names
    file_bytes: int = 0  # of the weight files
    other_bytes: int = 0  # of them, what is not quantized


def round_model(
    model: str | Path,
    out: str | Path,
    settings: Settings | None = None,
    *,
    calibration: str | Path | None = None,
    device: str = "auto",
    devices: Sequence[str] = (),
    ray: str | None = None,
    plan: dict[str, Any] | None = None,
    restart: bool = False,
    progress: Listener = silent,
) -> Result:
    """Round a model's decoder layers in one pass over its blocks, and write the checkpoint; as recipe.quantize.

    plan: kept with the checkpoint, as glq_plan.json. Goes on at the last block that an earlier call with the same
    arguments finished, if that was stopped; restart: begin anew.
    """
    start = time.monotonic()
    settings = settings or Settings()
    shared = pick_devices(devices) if devices else [pick_device(device)]
    where = shared[0]
    source, settings = open_model(model, settings)
    text = read_text(calibration)
    away = _refuse_unfit(source, settings, where, Path(out))
    tokens = _calibration_windows(source, text, settings, where)
    settings = replace(settings, tokens=tokens.numel())
    release_memory()  # what the tokenizer took
    record = _record(source, settings, text, where, plan)
    with workers_of(shared, ray) as workers, CheckpointWriter(Path(out), record, restart) as writer:
        rounder = GroupRounder(writer, workers, settings.seed, settings.damping)
        _round(source, tokens, settings, where, rounder, progress, away)
        stored = rounder.stored
        _write_rest(source, writer, set(stored))
        bits = 8 * sum(s.nbytes for s in stored.values()) / sum(s.module.weights for s in stored.values())
        modules = {name: s.module for name, s in stored.items()}
        errors = {name: s.lost for name, s in stored.items()}
        raw = source.config.to_dict() | {
            "quantization_config": GlqConfig(modules, round(bits, 4), __version__, settings.tensor_parallel).to_dict()
        }
        writer.add_json("config.json", raw)
        done = {"settings": asdict(settings), "calibration_sha256": hashlib.sha256(text.encode()).hexdigest()}
        left = source.unquantized(stored)
        if left:
            done["left"] = left
        if rounder.tokens:
            done["expert_tokens"] = rounder.tokens
        if rounder.findings:
            done["findings"] = rounder.findings
        writer.add_json("quantization.json", done | {"bits": bits, "errors": errors, "glq_version": __version__})
        if plan is not None:
            writer.add_json("glq_plan.json", plan)
        writer.commit()
    unreached = _unreached(rounder.tokens, source)
    return Result(
        Path(out),
        bits,
        time.monotonic() - start,
        peak_memory(),
        errors,
        unreached=unreached,
        left=left,
        findings=rounder.findings,
    )


def _refuse_unfit(source: SourceModel, settings: Settings, device: torch.device, out: Path) -> bool:
    """GlqError for what does not fit; whether what waits does so elsewhere than in the device's memory."""
    refuse_unwritable(out)
    codecs = {name: settings.codec_of(name) for name in source.layers}
    what = needs(source, codecs, settings.tokens or _default_tokens(source, device), device)
    refuse_unfit(what, out, device)
    return what.away


def _record(
    source: SourceModel, settings: Settings, text: str, device: torch.device, plan: dict[str, Any] | None
) -> dict[str, Any]:
    """All that the bytes of a checkpoint depend on, so that work goes on under the same conditions alone."""
    files = {name: (source.path / name).stat() for name in {*source.files.values(), "config.json"}}
    return {
        "glq": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "settings": asdict(settings),
        "calibration": hashlib.sha256(text.encode()).hexdigest(),
        "model": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(files.items())},
        "plan": None if plan is None else hashlib.sha256(json.dumps(plan).encode()).hexdigest(),
    }


def _unreached(tokens: dict[str, list[int]], source: SourceModel) -> dict[str, int]:
    """The experts for which the average of their layer counted more than what they read, and its tokens."""
    return {
        name.replace("*", str(expert)).rpartition(".")[0]: count
        for name, counts in tokens.items()
        for expert, count in enumerate(counts)
        if count < PRIOR * source.layers[name]
    }


def open_model(model: str | Path, settings: Settings) -> tuple[SourceModel, Settings]:
    """A model, and the settings as they hold for it. GlqError if they do not fit it, before any work."""
    source = SourceModel(resolve(model))
    settings = _with_tied_rates(settings, source)
    _refuse_idle_patterns(settings, source)
    _refuse_uneven_shards(settings, source)
    return source, settings


def _matches(layer: str, pattern: str) -> bool:
    return pattern == layer or fnmatchcase(layer, pattern)


def _refuse_idle_patterns(settings: Settings, source: SourceModel) -> None:
    """GlqError for exceptions that no layer matches: they are misspelt, or meant for another model."""
    layers = source.layers
    for pattern, codec in settings.layers:
        if not any(_matches(layer, pattern) for layer in layers):
            raise GlqError(
                f"no layer matches {pattern!r}, which should take {codec}: there are {next(iter(layers))!r}, and others"
            )


def _refuse_uneven_shards(settings: Settings, source: SourceModel) -> None:
    """GlqError if the ranks cannot have equal shards of whole tiles of what row-parallel layers read."""
    ranks = settings.tensor_parallel
    if ranks == 1:
        return
    if not source.row_parallel:
        raise GlqError(f"transformers has no tensor-parallel plan for {source.config.model_type!r}: leave out --tp")
    for name, width in source.layers.items():
        if name in source.row_parallel and width % (ranks * TILE_COLS):
            raise GlqError(
                f"{name} reads {width} channels, which are not {ranks} equal shards of whole tiles of {TILE_COLS}: "
                "choose another --tp"
            )


def _calibration_windows(source: SourceModel, text: str, settings: Settings, device: torch.device) -> Tensor:
    """[windows, ctx] token ids, evenly from the whole text."""
    tokenizer = load_tokenizer(source.path)
    if settings.tokens is not None:
        return windows(tokenizer, text, settings.tokens // settings.ctx, settings.ctx, spread=True)
    ids = windows(tokenizer, text, None, settings.ctx, spread=True)
    count = min(len(ids), max(1, _default_tokens(source, device) // settings.ctx))
    return ids[[i * len(ids) // count for i in range(count)]]


def _default_tokens(source: SourceModel, device: torch.device) -> int:
    """As many as half of the memory holds: the host's both models' states, a GPU's what experts read of them."""
    most, least = _TOKENS.get(device.type, 0), _TOKENS["cpu"]
    if device.type == "cuda":
        config = source.config.get_text_config()
        if have := available_memory():
            most = min(most, have // 2 // (2 * 4 * config.hidden_size))
        if experts := getattr(config, "num_experts_per_tok", None):
            inside = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
            widest = max(config.hidden_size, experts * inside)
            most = min(most, torch.cuda.get_device_properties(device).total_memory // 2 // (2 * 4 * widest))
    return max(least, most)


def _with_tied_rates(settings: Settings, source: SourceModel) -> Settings:
    """One rate for embeddings and head where they are one matrix. GlqError for embeddings that cannot be quantized."""
    if source.tied and {settings.embeddings, settings.head} != {None}:
        bits = settings.embeddings if settings.head is None else settings.head
        if settings.embeddings not in (None, bits):
            raise GlqError(f"embeddings and lm_head are one matrix here: {settings.embeddings} and {bits} bits differ")
        settings = replace(settings, embeddings=bits, head=bits)
    if settings.embeddings is not None:
        embedding_scale(source.module(source.embeddings))
    return settings


@torch.no_grad()
def _round(
    source: SourceModel,
    tokens: Tensor,
    settings: Settings,
    device: torch.device,
    rounder: GroupRounder,
    show: Listener,
    away: bool,
) -> None:
    """Take the calibration tokens through the model, block by block, and round its layers on the way.

    away: what is not worked on waits on the disk, and that of a GPU in the host's memory.
    """
    batches, writer = microbatches(tokens, device), rounder.writer
    spill = Spill(writer.folder if away and device.type == "cpu" else None)
    reference, calls = capture(source, batches, device, torch.float32)
    source.left |= look_ahead(source, reference[0], calls[0], device)
    quantized, first = list(reference), 0
    if writer.saved is not None:
        first = writer.saved["blocks"]
        rounder.restore(writer.saved)
        for name, state in writer.states():
            (reference if name.startswith("reference") else quantized)[int(name[-6:])] = state.to(device)
    elif settings.embeddings is not None:
        _round_embeddings(source, batches, settings, list(reference), calls, device, rounder)
        quantized, _ = capture(source, batches, device, torch.float32)
    if away and device.type == "cuda":
        reference, quantized = host_copies(reference), host_copies(quantized)
    spill.put([*reference, *quantized])

    def choice(group: Group) -> Choice:
        shards = settings.tensor_parallel if source.row_parallel & group.layers.keys() else 1
        return Choice(group, {name: settings.codec_of(name) for name in group.layers}, shards)

    def round_groups(groups: list[Group]) -> None:
        rounder(*map(choice, groups))

    def ended(block: int) -> None:
        rounder.note(source.blocks[block], of_states(reference))
        states = {f"{name}.{i:06}": x for name, xs in both.items() for i, x in enumerate(xs)}
        spill.put(states.values())
        last = block + 1 == len(source.blocks)
        writer.save({"blocks": block + 1} | rounder.to_dict(), states, last, lambda state: spill.put([state]))

    both = {"reference": reference, "rounded": quantized}  # in the order in which they are overwritten, which is theirs
    steps = walk(
        source,
        reference,
        quantized,
        calls,
        device,
        round_groups,
        first=first,
        together=rounder.workers.count,
        side_by_side=settings.side_by_side,
        spill=spill,
        free=writer.free,
        ended=ended,
    )
    for names, done, total in steps:
        lost = rounder.stored[names[0]].lost
        show(Progress("rounding", done, total, f"{names[0]}  error {lost:.4f}", names[0], lost))
    if settings.head is not None and not source.tied:
        states = final_states(source, batches, (reference, quantized), device)
        head = Group(source.as_linear(source.head, device), moments_of(states))
        rounder(Choice(head, {source.head: rate_codec(settings.head)}))


def _round_embeddings(
    source: SourceModel,
    batches: Sequence[Tensor],
    settings: Settings,
    hidden: list[Tensor],
    calls: list[list[Call]],
    device: torch.device,
    rounder: GroupRounder,
) -> None:
    """Round the input embeddings, and let the source have the rounded ones from here on.

    Where they are tied to the head, they are rounded for what the head reads in the reference, which matters most
    (docs/decisions.md); where they are not, every channel counts the same.
    """
    name = source.embeddings
    layers = source.as_linear(name, device)
    width = layers[name].in_features
    hessian = torch.eye(width, device=device)
    if source.tied:
        calls = [copied(of_blocks) for of_blocks in calls]
        for i, block in enumerate(source.blocks):
            loaded = source.load(block, device, torch.float32)
            for k, x in enumerate(hidden):
                hidden[k] = run_block(loaded, x, calls[k][i])
            source.unload(block)
        hessian = moments_of(final_states(source, batches, (hidden,), device)).hessian
    moments = Moments(hessian, torch.zeros_like(hessian))
    rounder(Choice(Group(layers, moments), {name: rate_codec(settings.embeddings or 0)}))
    source.replaced[source.stored_name(f"{name}.weight")] = layers[name].weight.data.cpu()


def _write_rest(source: SourceModel, writer: CheckpointWriter, quantized: set[str]) -> None:
    """What is not quantized goes into the checkpoint as it is: other tensors, tokenizer, licence."""
    replaced = source.files_of(quantized)
    for name in source.files:
        if name not in replaced:
            writer.add({name: source.read(name)})
    for pattern in _COPIED:
        for file in sorted(source.path.glob(pattern)):
            if file.name not in ("config.json", INDEX):
                writer.add_file(file)
