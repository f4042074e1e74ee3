"""How much worse a model is: perplexity, KL divergence to its reference, and how often their best tokens agree."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from glq.arguments import refuse_no_window
from glq.calibration import read_text, windows
from glq.errors import GlqError
from glq.hf_integration import load
from glq.hub import load_tokenizer, resolve
from glq.machine import pick_device

_CHUNK = 64  # positions whose logits over the vocabulary are held at once


@dataclass(frozen=True)
class Score:
    """Of one model, over `tokens` predicted tokens; kl is KL(reference ‖ model) in nats a token."""

    tokens: int
    perplexity: float
    kl: float
    kl_p99: float
    top1: float  # share of positions where the most likely token is the reference's
    nonfinite: int  # positions whose logits held NaN or infinity; counted nowhere else
    weight_bytes: int  # of the safetensors files


@torch.inference_mode()
def evaluate(
    reference: str | Path,
    models: list[str | Path],
    *,
    text: str | Path | None = None,
    tokens: int = 16384,
    ctx: int = 1024,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Score]:
    """Score the reference (first) and each model on a text: its first windows of ctx tokens, none overlapping.

    text is a UTF-8 file; without one, a public-domain text that the package ships, none of it in the calibration text.
    GlqError if the vocabularies differ or the text is too short.
    """
    refuse_no_window(tokens, ctx)
    where = pick_device(device)
    content = read_text(text, default="evaluation")
    tokenizer = load_tokenizer(resolve(reference))
    batches = windows(tokenizer, content, tokens // ctx, ctx, spread=False).to(where)
    names = [reference, *models]
    progress(0, len(batches))
    loaded = [load(name, device=where, dtype=dtype) for name in names]
    tallies = [_Tally() for _ in names]
    for done, window in enumerate(batches, 1):
        _compare(loaded, tallies, window)
        progress(done, len(batches))
    return [tally.score(_weight_bytes(resolve(name))) for tally, name in zip(tallies, names, strict=True)]


class _Tally:
    """One value a predicted token: negative log-likelihood, KL, agreement."""

    def __init__(self) -> None:
        self.nll: list[Tensor] = []
        self.kl: list[Tensor] = []
        self.agree: list[Tensor] = []

    def score(self, weight_bytes: int) -> Score:
        nll, kl, agree = (torch.cat(part).double().cpu() for part in (self.nll, self.kl, self.agree))
        good = torch.isfinite(nll) & torch.isfinite(kl)
        count = int(good.sum())
        if not count:
            return Score(0, math.nan, math.nan, math.nan, math.nan, len(nll), weight_bytes)
        return Score(
            tokens=count,
            perplexity=nll[good].mean().exp().item(),
            kl=kl[good].mean().item(),
            kl_p99=kl[good].quantile(0.99).item(),
            top1=agree[good].mean().item(),
            nonfinite=len(nll) - count,
            weight_bytes=weight_bytes,
        )


def _compare(models: list[PreTrainedModel], tallies: list[_Tally], window: Tensor) -> None:
    hidden = [model.base_model(window[None], use_cache=False).last_hidden_state[0, :-1] for model in models]
    if len({model.get_output_embeddings().out_features for model in models}) > 1:
        raise GlqError("the models have vocabularies of different sizes: they cannot be compared")
    for start in range(0, len(window) - 1, _CHUNK):
        part = slice(start, start + _CHUNK)
        target = window[1:][part, None]
        log_p = log_probabilities(models[0], hidden[0][part])
        best = log_p.argmax(-1)
        for model, tally, states in zip(models, tallies, hidden, strict=True):
            log_q = log_p if model is models[0] else log_probabilities(model, states[part])
            tally.nll.append(-log_q.gather(1, target)[:, 0])
            tally.kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
            tally.agree.append(log_q.argmax(-1) == best)


def log_probabilities(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[n, hidden] states of the last layer → [n, vocabulary] fp32."""
    logits = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return (torch.tanh(logits / cap) * cap if cap else logits).log_softmax(-1)


@torch.inference_mode()
def last_states(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """For each window of ids [windows, ctx]: the last layer's states [ctx, hidden]."""
    return [model.base_model(window[None], use_cache=False).last_hidden_state[0] for window in ids]


@torch.inference_mode()
def mean_divergence(model: PreTrainedModel, reference: PreTrainedModel, states: list[Tensor], ids: Tensor) -> float:
    """Mean KL(reference ‖ model) in nats a token over ids [windows, ctx]; states: `last_states` of the reference."""
    pairs = zip(states, (s for window in ids for s in last_states(model, window[None])), strict=True)
    return sum(total_divergence(reference, p, model, q).item() for p, q in pairs) / ids.numel()


def total_divergence(reference: PreTrainedModel, p: Tensor, model: PreTrainedModel, q: Tensor) -> Tensor:
    """KL(reference ‖ model) in nats, summed over the tokens whose last states are p and q [tokens, hidden]."""
    total = p.new_zeros((), dtype=torch.float64)
    for a, b in zip(p.split(_CHUNK), q.split(_CHUNK), strict=True):
        log_p = log_probabilities(reference, a)
        total += (log_p.exp() * (log_p - log_probabilities(model, b))).sum()
    return total


def _weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))
