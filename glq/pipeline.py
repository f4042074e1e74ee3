"""The pipeline: calibration → rotation → rounding → checkpoint, one decoder block at a time."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from glq import __version__
from glq.calibration import Moments, calibrate_block, capture, find_groups, read_text, windows
from glq.checkpoint import CheckpointWriter
from glq.codecs import CODECS, DEFAULT_CODECS, Codec, get_codec
from glq.codecs.packing import tile_rows
from glq.config import GlqConfig, ModuleConfig
from glq.errors import GlqError
from glq.files import INDEX
from glq.hub import load_tokenizer, resolve
from glq.machine import peak_memory, pick_device, release_memory
from glq.packed import PackedLinear, pack_codes, pack_signs, unpack_signs
from glq.progress import Listener, Progress, silent
from glq.rotation import block_width, random_signs, rotate, unrotate
from glq.rounding import GraphedPanelRounder, PanelRounder, factor, objective, round_matrix, round_panel, solve
from glq.source import SourceModel

HALF_STEP = 0.5  # of the way from the weights to those that fit the reference's outputs best
_MICROBATCH = {"cpu": 1024, "cuda": 4096}  # tokens at once: for little memory, for few launches
_TOKENS = {"cpu": 16384, "cuda": 65536}
_COPIED = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*")


@dataclass(frozen=True)
class Settings:
    """What a quantization depends on, besides the model: the same settings and device give the same bytes."""

    bits: float = 3
    codec: str = "auto"  # or a name in CODECS
    layers: tuple[tuple[str, str], ...] = ()  # (pattern of layer names, codec): exceptions, the last that matches holds
    tokens: int | None = None  # of calibration; None: 16,384 on a CPU, 65,536 on a GPU
    ctx: int = 1024
    seed: int = 0
    damping: float = 0.1

    def __post_init__(self) -> None:
        if self.codec == "auto":
            if not min(DEFAULT_CODECS) <= self.bits <= max(DEFAULT_CODECS):
                raise GlqError(
                    f"bits must lie between {min(DEFAULT_CODECS)} and {max(DEFAULT_CODECS)}, found {self.bits}"
                )
        elif get_codec(self.codec).bits != self.bits:
            raise GlqError(
                f"codec {self.codec!r} stores {CODECS[self.codec].bits} bits, not {self.bits}: ask for its bits"
            )
        for _, codec in self.layers:
            get_codec(codec)
        if self.ctx < 16 or (self.tokens is not None and self.tokens < self.ctx):
            raise GlqError(
                f"calibration needs ctx ≥ 16 and tokens ≥ ctx, found ctx {self.ctx} and tokens {self.tokens}"
            )

    def codec_of(self, layer: str) -> str:
        """The codec of a layer by its full name. GlqError if no codec has this rate and the layer is not named."""
        for pattern, codec in reversed(self.layers):
            if pattern == layer or fnmatchcase(layer, pattern):
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
    groups: tuple[tuple[str, ...], ...]  # layers that read the same input
    tuned: tuple[float, float] | None = None  # KL on held-out text before and after tuning


class Planned(Protocol):
    """What a pass needs to know of a plan: how to keep it with the checkpoint."""

    def write(self, path: Path) -> None: ...


def round_model(
    model: str | Path,
    out: str | Path,
    settings: Settings | None = None,
    *,
    calibration: str | Path | None = None,
    device: str = "auto",
    plan: Planned | None = None,
    targets: Callable[[str, Tensor], None] | None = None,
    progress: Listener = silent,
) -> Result:
    """Round a model's decoder layers in one pass over its blocks, and write the checkpoint; as recipe.quantize.

    targets is told each layer's name and the weights [out, in] fp32 that it would have had without rounding: the
    original ones, moved towards what makes up for the layers before it.
    """
    start = time.monotonic()
    settings = settings or Settings()
    where = pick_device(device)
    source = SourceModel(resolve(model))
    text = read_text(calibration)
    settings = replace(settings, tokens=settings.tokens or _TOKENS.get(where.type, _TOKENS["cpu"]))
    count = max(1, (settings.tokens or 0) // settings.ctx)
    tokens = windows(load_tokenizer(source.path), text, count, settings.ctx, spread=True)
    release_memory()  # what the tokenizer took
    with CheckpointWriter(Path(out)) as writer:
        stored, groups = _quantize_blocks(source, tokens, settings, where, targets, writer, progress)
        _write_rest(source, writer, set(stored))
        bits = 8 * sum(s.nbytes for s in stored.values()) / sum(s.module.weights for s in stored.values())
        modules = {name: s.module for name, s in stored.items()}
        errors = {name: s.lost for name, s in stored.items()}
        raw = source.config.to_dict() | {
            "quantization_config": GlqConfig(modules, round(bits, 4), __version__).to_dict()
        }
        writer.add_json("config.json", raw)
        record = {"settings": asdict(settings), "calibration_sha256": hashlib.sha256(text.encode()).hexdigest()}
        writer.add_json("quantization.json", record | {"bits": bits, "errors": errors, "glq_version": __version__})
        if plan is not None:
            writer.add_text("glq_plan.json", plan.write)
        writer.commit()
    return Result(Path(out), bits, time.monotonic() - start, peak_memory(), errors, groups)


@dataclass(frozen=True)
class _Stored:
    module: ModuleConfig
    nbytes: int
    lost: float


@torch.no_grad()
def _quantize_blocks(
    source: SourceModel,
    tokens: Tensor,
    settings: Settings,
    device: torch.device,
    targets: Callable[[str, Tensor], None] | None,
    writer: CheckpointWriter,
    progress: Listener,
) -> tuple[dict[str, _Stored], tuple[tuple[str, ...], ...]]:
    panels = GraphedPanelRounder() if device.type == "cuda" else round_panel
    batches = tokens.split(max(1, _MICROBATCH.get(device.type, 1024) // settings.ctx))
    reference, calls = capture(source, batches, device, torch.float32)
    quantized = list(reference)
    release_memory()
    stored: dict[str, _Stored] = {}
    all_groups: list[tuple[str, ...]] = []
    for i, name in enumerate(source.blocks):
        block = source.load(name, device, torch.float32)
        block_calls = [of_blocks[i] for of_blocks in calls]
        groups = find_groups(block, reference[0][:1], block_calls[0])

        def round_group(twin: nn.Module, members: list[str], moments: Moments, prefix: str = name) -> None:
            if not torch.isfinite(moments.hessian).all():
                raise GlqError(
                    f"{prefix}.{members[0]} reads NaN or infinite values on the calibration text: the model is broken"
                )
            seed = _seed(settings.seed, f"{prefix}.{members[0]}")
            codecs = {member: settings.codec_of(f"{prefix}.{member}") for member in members}
            for codec in dict.fromkeys(codecs.values()):
                chosen = [member for member in members if codecs[member] == codec]
                layers = [cast(nn.Linear, twin.get_submodule(member)) for member in chosen]
                packed, moved, lost = round_layers(layers, moments, get_codec(codec), seed, settings.damping, panels)
                for member, layer, p, target in zip(chosen, layers, packed, moved, strict=True):
                    label = f"{prefix}.{member}"
                    if targets is not None:
                        targets(label, unrotate(target, unpack_signs(p.signs, p.in_features), p.block))
                    if not torch.isfinite(p.scale).all():
                        raise GlqError(f"{label}: its weights are too large for 16-bit scales: the model is broken")
                    layer.weight.data = p.dequantize()
                    writer.add({f"{label}.codes": p.codes, f"{label}.scale": p.scale, f"{label}.signs": p.signs})
                    module = ModuleConfig(p.codec, p.in_features, p.out_features, p.block)
                    stored[label] = _Stored(module, p.nbytes, lost)

        for done in calibrate_block(block, groups, reference, quantized, block_calls, round_group):
            if done < len(groups):
                label = f"{name}.{groups[done][0]}"
                count, total = i * len(groups) + done + 1, len(source.blocks) * len(groups)
                progress(Progress("rounding", count, total, f"{label}  error {stored[label].lost:.4f}"))
        all_groups += [tuple(f"{name}.{member}" for member in members) for members in groups]
        source.unload(name)
        release_memory()
    return stored, tuple(all_groups)


def round_layers(
    layers: list[nn.Linear],
    moments: Moments,
    codec: Codec,
    seed: int,
    damping: float,
    panels: PanelRounder = round_panel,
) -> tuple[list[PackedLinear], list[Tensor], float]:
    """Round linear layers that read the same input, as one matrix.

    Returns them packed, what was rounded ([out, in], rotated), and the share of the outputs' energy that was lost.
    """
    height = tile_rows(codec.group)
    weight = torch.cat([pad(layer.weight.float(), (0, 0, 0, -layer.out_features % height)) for layer in layers])
    block = block_width(weight.shape[1])
    signs = random_signs(weight.shape[1], torch.Generator().manual_seed(seed))
    signs = signs.to(weight.device)
    h, drift = (_rotate_both(moment, signs, block) for moment in (moments.hessian, moments.drift))
    target = rotate(weight, signs, block)
    m = factor(h, damping)
    target += HALF_STEP * solve(m, target @ drift)
    rounded = round_matrix(target, h, m, codec, panels)
    scale = rounded.scale.to(torch.float16)
    lost = objective(target, rounded.values * scale.float()[:, None], h).item()
    packed, targets, tile = [], [], 0
    for layer in layers:
        tiles = -(-layer.out_features // height)
        codes = pack_codes(rounded.codes[tile : tile + tiles], codec.name)
        rows = scale[tile * height :][: layer.out_features].clone()
        packed.append(
            PackedLinear(codec.name, layer.out_features, layer.in_features, block, codes, rows, pack_signs(signs))
        )
        targets.append(target[tile * height :][: layer.out_features])
        tile += tiles
    return packed, targets, lost


def _seed(seed: int, name: str) -> int:
    """A seed for each group of layers, independent of the order in which they come."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") % 2**63


def _rotate_both(h: Tensor, signs: Tensor, block: int) -> Tensor:
    """R·h·Rᵀ."""
    return rotate(rotate(h, signs, block).T, signs, block).T.contiguous()


def _write_rest(source: SourceModel, writer: CheckpointWriter, quantized: set[str]) -> None:
    """What is not quantized goes into the checkpoint as it is: other tensors, tokenizer, licence."""
    replaced = {f"{name}.weight" for name in quantized}
    for name in source.files:
        if name not in replaced:
            writer.add({name: source.read(name)})
    for pattern in _COPIED:
        for file in sorted(source.path.glob(pattern)):
            if file.name not in ("config.json", INDEX):
                writer.add_file(file)
