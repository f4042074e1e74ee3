"""What transformers gives with an E8 KV cache of what vLLM's was given, beside what vLLM gave."""

import torch

from glq import GlqCache


class PromptsInFull(GlqCache):
    """Tokens that come together see each other as they are."""

    def update(self, key_states, value_states, *args, **kwargs):
        both = super().update(key_states, value_states, *args, **kwargs)
        new = key_states.shape[-2]
        if new > 1:
            for kept, own in zip(both, (key_states, value_states), strict=True):
                kept[..., -new:, :] = own
        return both


def following(written, cache):
    """The cache is given what vLLM's was, which is the same but for last bits.

    Sums in another order are not equal in these, and once in some ten thousand words two are as near: what decides
    between them, decides log-probs by a thousandth. written: of each layer, [2, tokens, heads, channels].
    """
    update = cache.update

    def follow(keys, values, layer, *args, **kwargs):
        theirs = [nearest(x, those) for x, those in zip((keys, values), written[layer], strict=True)]
        return update(*theirs, layer, *args, **kwargs)

    cache.update = follow
    return cache


def nearest(x, written):
    """x [1, heads, tokens, channels] → for each token its own of written [n, heads, channels]."""
    mine, theirs = x[0].transpose(0, 1).flatten(1), written.flatten(1)
    apart, own = torch.cdist(mine, theirs, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert (apart < 1e-5 * mine.norm(dim=1)).all()
    return written[own].transpose(0, 1)[None]


def logits_of(model, prompt, tokens, cache):
    """Those that each of the tokens was chosen by, [tokens, vocabulary]."""
    with torch.inference_mode():
        if not isinstance(cache, PromptsInFull):  # it makes no difference what comes together
            ids = torch.tensor([prompt + tokens[:-1]])
            return model(ids, past_key_values=cache).logits[0, len(prompt) - 1 :].float()
        parts = [model(torch.tensor([prompt]), past_key_values=cache).logits[:, -1:]]
        parts += [model(torch.tensor([[token]]), past_key_values=cache).logits for token in tokens[:-1]]
    return torch.cat(parts, 1)[0].float()


def differences(answer, model, prompts, make_cache):
    """Of all tokens' log-probs, and by how much each is less likely than the likeliest token.

    Where the answer has what vLLM's cache was given, a cache of codes is given that.
    """
    assert isinstance(answer, dict), answer[-6000:]
    apart, behind = [], []
    for prompt, tokens, logprobs in zip(prompts, answer["tokens"], answer["logprobs"], strict=True):
        cache = make_cache()
        if "writes" in answer and isinstance(cache, GlqCache):
            cache = following(answer["writes"], cache)
        expected = logits_of(model, prompt, tokens, cache).log_softmax(-1)
        chosen = expected[torch.arange(len(tokens)), tokens]
        apart.append((chosen - torch.tensor(logprobs)).abs())
        behind.append(expected.max(-1).values - chosen)
    return torch.cat(apart), torch.cat(behind)
