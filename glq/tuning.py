"""Distillation of what costs no bits: row scales, norms and biases, trained towards the reference's own predictions.

The codes stay as they are. Each optimizer step compares the quantized model's logits with the reference's, KL
divergence in nats a token, on windows of the calibration text. Some windows are held out: the best state on those is
what is kept, so training on too little text stops by itself. On a GPU, half of the windows are written by the
reference itself: a text of some hundred thousand tokens alone would be learnt by heart.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from glq.calibration import read_text, windows
from glq.checkpoint import DIGESTS, read_config
from glq.embedding import QuantEmbedding
from glq.errors import GlqError
from glq.evaluation import last_states, log_probabilities, mean_divergence
from glq.files import INDEX, read_index
from glq.hf_integration import dequantize_embeddings
from glq.hub import load_tokenizer, resolve
from glq.linear import QuantLinear
from glq.machine import pick_device
from glq.naming import Naming
from glq.progress import Listener, Progress, silent
from glq.quant_experts import QuantExperts
from glq.rendering import write_pages
from glq.report import REPORT, after_tuning, read_report
from glq.sampling import sample_windows
from glq.writer import CheckpointWriter

_CHUNK = 512  # positions whose logits over the vocabulary are held at once
_LARGE = 3e9  # bytes of weight files from which weights are held in bf16
_HELD_OUT = {"cpu": 6, "cuda": 16}  # windows
_DEFAULTS = {"cpu": (2, 100, 0), "cuda": (8, 600, 1024)}  # windows a step, steps, windows to sample


@dataclass(frozen=True)
class TuneSettings:
    """None: what suits the device (100 steps of 2 windows on a CPU; on a GPU 600 of 8, and 1,024 windows sampled)."""

    steps: int | None = None
    batch: int | None = None  # windows a step
    sampled: int | None = None  # windows that the reference writes; then half of each step's are such
    ctx: int = 1024
    learning_rate: float = 1e-3  # of AdamW, relative to a parameter's size; with warm-up and cosine decay
    patience: int = 4  # held-out scores in a row that may be worse than the best
    seed: int = 0


@dataclass(frozen=True)
class TuneResult:
    """KL on the held-out windows before and after, and the step whose state was kept (0: nothing was better)."""

    before: float
    after: float
    step: int
    seconds: float


@dataclass(frozen=True)
class Split:
    """Windows [n, ctx] of token ids, each with `prefix` tokens (BOS) in front: to train on, and to judge by."""

    train: Tensor
    held_out: Tensor
    prefix: int


class TunableLinear(nn.Module):
    """A quantized layer with its codes decoded once: y = (x · Wᵀ) · (1 + gain), gain [out] fp32 to be trained."""

    weight: Tensor

    def __init__(self, packed: QuantLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", packed.packed.dequantize().to(dtype))
        self.gain = nn.Parameter(torch.zeros(packed.out_features, device=packed.codes.device))
        self.bias = None if packed.bias is None else nn.Parameter(packed.bias.float())

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight).float() * (1 + self.gain)  # fp32: a small gain must not round to 0
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def tune(
    checkpoint_dir: str | Path,
    out: str | Path,
    reference: str | Path,
    settings: TuneSettings | None = None,
    *,
    text: str | Path | None = None,
    device: str = "auto",
    progress: Listener = silent,
) -> TuneResult:
    """Tune a glq checkpoint towards `reference` on a UTF-8 text, and write the result to `out`.

    May be repeated with other text. GlqError if the text is too short, or the two models do not belong together.
    """
    settings = settings or TuneSettings()
    where = pick_device(device)
    path = Path(checkpoint_dir)
    read_config(path)
    settings = _with_defaults(settings, where)
    split = split_text(reference, settings, text, where)
    with CheckpointWriter(Path(out)) as writer:
        dtype = _precision(reference, where)
        teacher, student = _load(reference, where, dtype), _load(path, where, dtype)
        trainable = _make_tunable(student, dtype)
        with _fast(where, dtype):
            batches = _batches(teacher, split, settings, progress)
            result = _train(student, teacher, trainable, batches, split.held_out, settings, progress)
        replaced = {name: p.detach() for name, p in trainable.items() if not name.endswith(".gain")}
        gains = {name.removesuffix(".gain"): p for name, p in trainable.items() if name.endswith(".gain")}
        _write(path, writer, Naming(student), replaced, {name: gain.detach().cpu() for name, gain in gains.items()})
        writer.commit()
    if (Path(out) / REPORT).is_file():
        write_pages(Path(out), after_tuning(read_report(out), Path(out).name, result.before, result.after))
    return result


def _with_defaults(settings: TuneSettings, device: torch.device) -> TuneSettings:
    batch, steps, sampled = _DEFAULTS.get(device.type, _DEFAULTS["cpu"])
    return replace(
        settings,
        batch=settings.batch or batch,
        steps=settings.steps or steps,
        sampled=sampled if settings.sampled is None else settings.sampled,
    )


def split_text(reference: str | Path, settings: TuneSettings, text: str | Path | None, device: torch.device) -> Split:
    """GlqError if a text has too few windows."""
    tokenizer = load_tokenizer(resolve(reference))
    ids = windows(tokenizer, read_text(text), None, settings.ctx, spread=True)
    held = _HELD_OUT.get(device.type, 8)
    if len(ids) < 2 * held:
        raise GlqError(
            f"tuning needs at least {2 * held} windows of {settings.ctx} tokens, the text has {len(ids)}: "
            "give a longer one"
        )
    stride = len(ids) // held
    is_held = torch.zeros(len(ids), dtype=torch.bool)
    is_held[stride // 2 :: stride] = True
    return Split(ids[~is_held], ids[is_held], len(tokenizer("")["input_ids"]))


def _precision(model: str | Path, device: torch.device) -> torch.dtype:
    """fp32 where two models of that size fit easily, bf16 for large ones on a GPU."""
    size = sum(file.stat().st_size for file in resolve(model).glob("*.safetensors"))
    return torch.bfloat16 if device.type != "cpu" and size > _LARGE else torch.float32


def _load(model: str | Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    loaded = AutoModelForCausalLM.from_pretrained(resolve(model), dtype=dtype, use_safetensors=True)
    return loaded.to(device).eval().requires_grad_(False)


@contextmanager
def _fast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """TF32 for fp32 products on a GPU: ten bits are enough for gradients. With bf16 weights, bf16 for all products."""
    before = torch.get_float32_matmul_precision()
    if device.type != "cpu":
        torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _make_tunable(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Replace quantized layers; the parameters that may be trained, by name: gains, norms and biases."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            model.set_submodule(name, TunableLinear(module, dtype))
        elif isinstance(module, QuantExperts):
            model.set_submodule(name, module.dequantize(dtype))  # their scales stay as they are
        elif isinstance(module, QuantEmbedding):
            dequantize_embeddings(model, name, module, dtype)
    trainable = {name: p for name, p in model.named_parameters() if p.ndim == 1}
    for p in trainable.values():
        p.data = p.data.float()
        p.requires_grad_(True)
    return trainable


def _train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    trainable: dict[str, nn.Parameter],
    batches: Iterator[Tensor],
    held_out: Tensor,
    settings: TuneSettings,
    progress: Listener,
) -> TuneResult:
    start = time.monotonic()
    steps = settings.steps or 0
    optimizer = torch.optim.AdamW(_groups(trainable, settings.learning_rate), weight_decay=0.0)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    every = max(1, steps // 8)
    held_out = held_out.to(student.device)
    states = last_states(teacher, held_out)
    before = best = latest = mean_divergence(student, teacher, states, held_out)
    kept, kept_step, worse = _state(trainable), 0, 0
    for step in range(1, steps + 1):
        optimizer.zero_grad(set_to_none=True)
        loss = _backward(student, teacher, next(batches).to(student.device))
        torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == steps:
            latest = mean_divergence(student, teacher, states, held_out)
            worse = worse + 1 if latest >= best else 0
            if latest < best:
                best, kept, kept_step = latest, _state(trainable), step
        progress(Progress("tuning", step, steps, f"KL {loss:.4f}, held out {latest:.4f}"))
        if worse >= settings.patience:
            break
    for name, value in kept.items():
        trainable[name].data.copy_(value)
    return TuneResult(before, best, kept_step, time.monotonic() - start)


def _groups(trainable: dict[str, nn.Parameter], learning_rate: float) -> list[dict[str, Any]]:
    """A step of AdamW moves every value by about the learning rate: of 1 for a gain, of its own size for the others."""
    of_size: dict[float, list[nn.Parameter]] = {}
    for name, p in trainable.items():
        of_size.setdefault(1.0 if name.endswith(".gain") else _rms(p), []).append(p)
    return [{"params": ps, "lr": learning_rate * size} for size, ps in of_size.items()]


def _rms(p: Tensor) -> float:
    return p.detach().square().mean().sqrt().item() or 1.0


def _backward(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> float:
    """Mean KL(teacher ‖ student) over all positions of ids [windows, ctx]; adds its gradient to the student's.

    A chunk of positions goes through the heads and back before the next one does, so that logits are made only once.
    """
    with torch.no_grad():
        target = teacher.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
    out = student.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
    hidden = out.detach().requires_grad_()
    total = hidden.new_zeros(())
    for h, t in zip(hidden.split(_CHUNK), target.split(_CHUNK), strict=True):
        with torch.no_grad():
            log_p = log_probabilities(teacher, t)
        loss = (log_p.exp() * (log_p - log_probabilities(student, h))).sum() / len(out)
        loss.backward()
        total += loss.detach()
    out.backward(hidden.grad)
    return total.item()


def _batches(teacher: PreTrainedModel, split: Split, settings: TuneSettings, progress: Listener) -> Iterator[Tensor]:
    """Windows [batch, ctx] for each step, without end: half of the user's text, half of what the teacher writes."""
    batch, count = settings.batch or 1, settings.sampled or 0
    if not count or batch == 1:
        return _shuffled(split.train, batch, settings.seed)

    def show(done: int, total: int) -> None:
        progress(Progress("sampling", done, total, f"{count} windows of text"))

    sampled = sample_windows(teacher, split.train, count, split.prefix, settings.seed, show)
    parts = _shuffled(split.train, batch - batch // 2, settings.seed), _shuffled(sampled, batch // 2, settings.seed)
    return map(torch.cat, zip(*parts, strict=True))


def _shuffled(ids: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches of windows without end, each epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(ids), generator=generator).split(batch):
            yield ids[rows]


def _state(trainable: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainable.items()}


def _write(
    source: Path, writer: CheckpointWriter, naming: Naming, replaced: dict[str, Tensor], gains: dict[str, Tensor]
) -> None:
    """The checkpoint with tuned scales, norms and biases (these in fp32: a few values, whose digits matter)."""
    files = read_index(source)
    for name, file in files.items():
        with safe_open(source / file, "pt") as f:
            tensor = f.get_tensor(name)
        target = naming.target(name)[0]
        layer, _, kind = target.rpartition(".")
        if kind == "scale" and layer in gains:
            tensor = (tensor.float() * (1 + gains[layer])).to(tensor.dtype)
        elif target in replaced:
            tensor = replaced[target].float().cpu().view_as(tensor)
        writer.add({name: tensor})
    for extra in sorted(source.iterdir()):
        if extra.is_file() and extra.suffix != ".safetensors" and extra.name not in (DIGESTS, INDEX):
            writer.add_file(extra)
