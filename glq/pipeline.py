"""The pipeline: calibration → rotation → rounding → checkpoint, one decoder block at a time."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from glq import __version__
from glq.calibration import Moments, calibrate_block, capture, find_groups, read_text, windows
from glq.checkpoint import CheckpointWriter
from glq.codecs import CODECS, DEFAULT_CODECS, Codec, get_codec
from glq.codecs.packing import TILE_ROWS
from glq.config import GlqConfig, ModuleConfig
from glq.errors import GlqError
from glq.files import INDEX
from glq.hub import load_tokenizer, resolve
from glq.machine import peak_memory, pick_device, release_memory
from glq.packed import PackedLinear, pack_codes, pack_signs
from glq.rotation import block_width, random_signs, rotate
from glq.rounding import GraphedPanelRounder, PanelRounder, factor, objective, round_matrix, round_panel, solve
from glq.source import SourceModel

HALF_STEP = 0.5  # of the way from the weights to those that fit the reference's outputs best
_MICROBATCH = {"cpu": 1024, "cuda": 4096}  # tokens at once: for little memory, for few launches
_COPIED = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*")


@dataclass(frozen=True)
class Settings:
    """What a quantization depends on, besides the model: the same settings and device give the same bytes."""

    bits: float = 3
    codec: str = "auto"  # or a name in CODECS
    layers: tuple[tuple[str, str], ...] = ()  # (pattern of layer names, codec): exceptions, the last that matches holds
    tokens: int = 16384  # of calibration
    ctx: int = 1024
    seed: int = 0
    damping: float = 0.1

    def __post_init__(self) -> None:
        if self.codec == "auto":
            if self.bits not in DEFAULT_CODECS:
                raise GlqError(f"bits must be one of {', '.join(map(str, DEFAULT_CODECS))}, found {self.bits}")
        elif get_codec(self.codec).bits != self.bits:
            raise GlqError(
                f"codec {self.codec!r} stores {CODECS[self.codec].bits} bits, not {self.bits}: ask for its bits"
            )
        for _, codec in self.layers:
            get_codec(codec)
        if self.ctx < 16 or self.tokens < self.ctx:
            raise GlqError(
                f"calibration needs ctx ≥ 16 and tokens ≥ ctx, found ctx {self.ctx} and tokens {self.tokens}"
            )

    def codec_of(self, layer: str) -> str:
        """The codec of a layer by its full name."""
        default = DEFAULT_CODECS[self.bits] if self.codec == "auto" else self.codec
        return next((codec for pattern, codec in reversed(self.layers) if fnmatchcase(layer, pattern)), default)


@dataclass(frozen=True)
class Progress:
    """`done` of `total` groups of layers, the name of the last one and the share of output energy it lost."""

    done: int
    total: int
    name: str
    error: float


@dataclass(frozen=True)
class Result:
    """What a quantization did."""

    path: Path
    bits: float  # stored, all included
    seconds: float
    peak_bytes: int  # resident memory of the process at its highest
    errors: dict[str, float]  # share of each layer's output energy that rounding lost, on the calibration text


def quantize(
    model: str | Path,
    out: str | Path,
    settings: Settings | None = None,
    *,
    calibration: str | Path | None = None,
    device: str = "auto",
    progress: Callable[[Progress], None] = lambda _: None,
) -> Result:
    """Quantize a Hugging Face model directory (or hub name) into the checkpoint directory `out`.

    calibration is a UTF-8 text file; without one, a public-domain text that the package ships is used. Raises GlqError
    before any work starts if the model, the text, the settings or `out` are not fit for it; nothing is overwritten.
    """
    start = time.monotonic()
    settings = settings or Settings()
    where = pick_device(device)
    source = SourceModel(resolve(model))
    text = read_text(calibration)
    tokens = windows(load_tokenizer(source.path), text, settings.tokens // settings.ctx, settings.ctx, spread=True)
    release_memory()  # what the tokenizer took
    with CheckpointWriter(Path(out)) as writer:
        stored = _quantize_blocks(source, tokens, settings, where, writer, progress)
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
        writer.commit()
    return Result(Path(out), bits, time.monotonic() - start, peak_memory(), errors)


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
    writer: CheckpointWriter,
    progress: Callable[[Progress], None],
) -> dict[str, _Stored]:
    panels = GraphedPanelRounder() if device.type == "cuda" else round_panel
    batches = tokens.split(max(1, _MICROBATCH.get(device.type, 1024) // settings.ctx))
    reference, calls = capture(source, batches, device, torch.float32)
    quantized = list(reference)
    release_memory()
    stored: dict[str, _Stored] = {}
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
                packed, lost = round_layers(layers, moments, get_codec(codec), seed, settings.damping, panels)
                for member, layer, p in zip(chosen, layers, packed, strict=True):
                    label = f"{prefix}.{member}"
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
                progress(Progress(count, total, label, stored[label].lost))
        source.unload(name)
        release_memory()
    return stored


def round_layers(
    layers: list[nn.Linear],
    moments: Moments,
    codec: Codec,
    seed: int,
    damping: float,
    panels: PanelRounder = round_panel,
) -> tuple[list[PackedLinear], float]:
    """Round linear layers that read the same input, as one matrix: them packed, and the share of energy lost."""
    weight = torch.cat([pad(layer.weight.float(), (0, 0, 0, -layer.out_features % TILE_ROWS)) for layer in layers])
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
    packed, tile = [], 0
    for layer in layers:
        tiles = -(-layer.out_features // TILE_ROWS)
        codes = pack_codes(rounded.codes[tile : tile + tiles], codec.name)
        rows = scale[tile * TILE_ROWS :][: layer.out_features].clone()
        packed.append(
            PackedLinear(codec.name, layer.out_features, layer.in_features, block, codes, rows, pack_signs(signs))
        )
        tile += tiles
    return packed, lost


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
