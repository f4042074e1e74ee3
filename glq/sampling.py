"""Text that a model writes itself: more to tune on than the user has, and from where its own predictions live."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from glq.evaluation import log_probabilities
from glq.kv.cache import cache_keyword

_PIECE = 256  # tokens of one sequence; a window holds several
_PROMPT = 32  # of them come from the given text
_AT_ONCE = {"cpu": 64, "cuda": 1024}  # sequences


@torch.inference_mode()
def sample_windows(
    model: PreTrainedModel,
    text: Tensor,
    count: int,
    prefix: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """[count, ctx] token ids: pieces of up to 256 tokens that continue, at temperature 1, 32 tokens of the text.

    text [windows, ctx] token ids, of which every window begins with the `prefix` tokens of the tokenizer (BOS), as
    every piece does.
    """
    windows, ctx = text.shape
    pieces = -(-ctx // _PIECE)
    length = -(-ctx // pieces)
    prompt = min(_PROMPT, length // 2)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(windows, (count * pieces,), generator=generator)
    starts = torch.randint(prefix, ctx - prompt + 1, (count * pieces,), generator=generator)
    prompts = text[rows[:, None], starts[:, None] + torch.arange(prompt)]
    prompts = torch.cat([text[:1, :prefix].expand(len(prompts), -1), prompts], dim=1)
    batches = prompts.split(_AT_ONCE.get(model.device.type, 64))
    done = []
    for i, batch in enumerate(batches):
        progress(i, len(batches))
        done.append(_continue(model, batch.to(model.device), length, seed + i).cpu())
    progress(len(batches), len(batches))
    return torch.cat(done).reshape(count, -1)[:, :ctx]


def _continue(model: PreTrainedModel, ids: Tensor, length: int, seed: int) -> Tensor:
    """ids [n, prompt] → [n, length]: each token drawn from the model's own distribution, end of text included."""
    generator = torch.Generator(model.device).manual_seed(seed)
    step, past, keyword = ids, None, cache_keyword(model.base_model)
    while ids.shape[1] < length:
        out = model.base_model(step, use_cache=True, **{keyword: past})
        past = out[keyword]
        probabilities = log_probabilities(model, out.last_hidden_state[:, -1]).exp()
        step = torch.multinomial(probabilities, 1, generator=generator)
        ids = torch.cat([ids, step], dim=1)
    return ids
