"""What is found by running a model's blocks: groups, what stays as it is, and what is refused before any work."""

import pytest
import torch
from conftest import make_model
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from glq import GlqError
from glq.discovery import Call, capture, copied, find_groups, look_ahead
from glq.source import SourceModel

CPU = torch.device("cpu")


class Block(nn.Module):
    """Layers that run once, twice and never, and one that does not see all tokens."""

    def __init__(self, some_tokens: bool = False):
        super().__init__()
        self.q, self.k, self.twice, self.never = (nn.Linear(64, 64) for _ in range(4))
        self.tiny, self.other = nn.Linear(64, 2), nn.Linear(64, 64)
        self.some_tokens = some_tokens

    def forward(self, x):
        y = self.twice(self.twice(self.q(x) + self.k(x)))
        z = self.other(y[:, :5] if self.some_tokens else y)
        return x + (z.sum() + self.tiny(y).sum() + (y @ self.never.weight))


def test_layers_that_do_not_run_once_stay_as_they_are():
    groups, left = find_groups(Block(), torch.randn(2, 8, 64), Call((), {}))
    assert groups == [["q", "k"], ["other"]]
    assert left == {"twice": "runs more than once in a pass", "never": "is not run as a module"}


def test_layers_that_read_some_tokens_are_refused():
    with pytest.raises(GlqError, match="other reads only some of the tokens"):
        find_groups(Block(some_tokens=True), torch.randn(2, 8, 64), Call((), {}))


def test_copied_calls_share_tensors_but_not_what_blocks_leave_in_them():
    shared, tensor = {"a": torch.ones(1)}, torch.ones(2)
    calls = [Call((tensor, shared), {}), Call((tensor,), {"states": shared})]
    own = copied(calls)
    assert own[0].args[0] is tensor
    assert own[0].args[1] is own[1].kwargs["states"]
    own[0].args[1]["b"] = 1
    assert shared.keys() == {"a"}


@pytest.mark.parametrize("form", [lambda x: (x, None), lambda x: (x,), lambda x: x])
def test_blocks_that_return_tuples(form, tiny_model, monkeypatch):
    source = SourceModel(tiny_model)
    tokens = torch.randint(302, (2, 16))
    expected, _ = capture(source, [tokens], CPU, torch.float32)

    def forward(input_ids, use_cache):
        with torch.no_grad():
            hidden = source.model.model.embed_tokens(input_ids)
            for layer in source.model.model.layers:
                out = layer(hidden, position_embeddings=None)
                if isinstance(form(hidden), tuple):
                    hidden, *_ = out if isinstance(out, tuple) and len(out) == len(form(hidden)) else (out[0][0],)
                else:
                    hidden = out

    monkeypatch.setattr(source.model.model, "forward", forward)
    found, calls = capture(source, [tokens], CPU, torch.float32)
    assert torch.equal(found[0], expected[0])
    assert len(calls[0]) == len(source.blocks)
    assert isinstance(source.block_output(hidden := torch.ones(1)), type(form(hidden)))


def test_a_block_that_cannot_run_is_refused_before_any_work(tiny_model, monkeypatch):
    source = SourceModel(tiny_model)
    hidden, calls = capture(source, [torch.randint(302, (2, 16))], CPU, torch.float32)
    monkeypatch.setattr(source.module(source.blocks[1]), "forward", lambda *_, **__: 1 / torch.ones(2)[None, None, 5])
    monkeypatch.setattr("glq.discovery._made_of", id)
    with pytest.raises(GlqError, match=r"model.layers.1: a LlamaDecoderLayer cannot be run on its own: "):
        look_ahead(source, hidden[0], calls[0], CPU)


def test_decoder_blocks_are_those_of_the_text_model_however_large_others_are(tmp_path):
    text = {"vocab_size": 302, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 16}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 32}
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path)
    assert SourceModel(tmp_path).blocks == ["model.language_model.layers.0"]


def test_what_is_left_has_a_reason(tmp_path):
    source = SourceModel(make_model(tmp_path, num_hidden_layers=1))
    left = source.unquantized(set(source.layers) - {"model.layers.0.mlp.up_proj"})
    assert left["lm_head"] == "is outside of the decoder blocks"
    assert left.keys() == {"lm_head", "model.layers.0.mlp.up_proj"}
