"""Text that a model writes: drawn from its own distribution, begun with the user's text."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from glq.evaluation import log_probabilities
from glq.sampling import sample_windows


@pytest.fixture(scope="module")
def model(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    model.lm_head.weight.data.mul_(20)  # predictions that differ from a uniform draw, and from one position to the next
    return model


def windows_of(model, ctx, prefix):
    text = torch.randint(5, model.config.vocab_size, (3, ctx), generator=torch.Generator().manual_seed(0))
    text[:, :prefix] = 2
    return text


@pytest.mark.parametrize(("ctx", "prefix"), [(64, 0), (64, 1), (300, 1), (513, 0)])
def test_pieces_begin_with_the_prefix_and_the_text(model, ctx, prefix):
    text = windows_of(model, ctx, prefix)
    sampled = sample_windows(model, text, 5, prefix, seed=0)
    assert sampled.shape == (5, ctx)
    length = -(-ctx // -(-ctx // 256))
    runs = {tuple(run.tolist()) for row in text for run in row[prefix:].unfold(0, min(32, length // 2), 1)}
    for piece in sampled[:, :length]:
        assert (piece[:prefix] == 2).all()
        assert tuple(piece[prefix : prefix + min(32, length // 2)].tolist()) in runs


def test_tokens_are_drawn_from_the_models_distribution(model):
    sampled = sample_windows(model, windows_of(model, 256, 1), 24, 1, seed=1)
    with torch.inference_mode():
        states = model.base_model(sampled).last_hidden_state[:, 32:-1].flatten(0, 1)
        log_p = log_probabilities(model, states)
    drawn = log_p.gather(1, sampled[:, 33:].reshape(-1, 1))[:, 0]
    mean, variance = (log_p.exp() * log_p).sum(-1), (log_p.exp() * log_p.square()).sum(-1)
    deviation = (variance - mean.square()).sum().sqrt()
    assert abs((drawn - mean).sum()) < 4 * deviation


def test_the_seed_decides(model):
    text = windows_of(model, 64, 0)
    first, again, other = (sample_windows(model, text, 4, 0, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
