"""Blocks that glq has never seen: quantized as any others, or refused before any work; never half, without a word."""

import json

import pytest
import torch
from conftest import make_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

import glq
from glq import GlqError, Settings, calibration, pipeline
from glq.hf_integration import load


class StrangeConfig(PretrainedConfig):
    model_type = "strange-of-glq-tests"

    def __init__(self, kind="plain", hidden_size=64, vocab_size=302, num_hidden_layers=2, **rest):
        super().__init__(**rest)
        self.kind, self.hidden_size, self.vocab_size = kind, hidden_size, vocab_size
        self.num_hidden_layers = num_hidden_layers


class StrangeBlock(nn.Module):
    """No attention: running means, gates, and names that no model has. kind: what is odd about it."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.kind = config.kind
        self.ahead, self.aside = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width)
        self.home = nn.Linear(2 * width, width, bias=False)
        if self.kind == "raw":
            self.raw = nn.Parameter(torch.randn(width, width) / 8)

    def forward(self, x, state=None):
        mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
        y = nn.functional.layer_norm(mean + x, x.shape[-1:])
        if self.kind == "some":
            y = torch.cat([self.home(torch.tanh(self.ahead(y[:, :4]))), y[:, 4:] + 0 * self.aside(y)[:, 4:, :64]], 1)
            return (x + y,)
        y = self.home(torch.tanh(self.ahead(y)) * self.aside(y))
        return (x + y @ self.raw if self.kind == "raw" else x + y,)


class StrangeModel(PreTrainedModel):
    config_class, base_model_prefix = StrangeConfig, "core"
    _no_split_modules = ()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(std=0.1)


class StrangeCore(StrangeModel):
    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.tower = nn.ModuleList(StrangeBlock(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, use_cache=None, **_):
        hidden = self.words(input_ids)
        for block in self.tower:
            (hidden,) = block(hidden, state=None)
        return BaseModelOutput(last_hidden_state=hidden)


class StrangeForCausalLM(StrangeModel):
    def __init__(self, config):
        super().__init__(config)
        self.core = StrangeCore(config)
        self.out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.core.words

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids, **_):
        return CausalLMOutput(logits=self.out(self.core(input_ids).last_hidden_state))


AutoConfig.register(StrangeConfig.model_type, StrangeConfig)
AutoModelForCausalLM.register(StrangeConfig, StrangeForCausalLM)
SETTINGS = Settings(bits=4, codec="nested-4", tokens=128, ctx=32)
TOKENS = torch.randint(2, 302, (4, 32), generator=torch.Generator().manual_seed(0))


def strange(folder, kind):
    StrangeForCausalLM(StrangeConfig(kind)).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True)
def windows(monkeypatch):
    monkeypatch.setattr(pipeline, "_calibration_windows", lambda *_: TOKENS)


@pytest.mark.parametrize("kind", ["plain", "raw"])
def test_a_block_of_unknown_layers_is_quantized(kind, tmp_path, monkeypatch):
    memory, walk = [], calibration.walk

    def remember(source, reference, quantized, *args, **kwargs):
        yield from walk(source, reference, quantized, *args, **kwargs)
        memory.extend(quantized)

    monkeypatch.setattr(pipeline, "walk", remember)
    result = glq.quantize(strange(tmp_path / "m", kind), tmp_path / "out", SETTINGS, device="cpu")
    names = {f"core.tower.{i}.{key}" for i in range(2) for key in ("ahead", "aside", "home")}
    assert glq.inspect(tmp_path / "out").config.modules.keys() == names
    loaded = load(tmp_path / "out", device="cpu")
    with torch.no_grad():
        hidden = loaded.core(TOKENS).last_hidden_state
    expected = torch.cat(memory)
    assert (hidden - expected).norm() <= 1e-4 * expected.norm()
    raw = {f"core.tower.{i}.raw": "is a matrix of a StrangeBlock, no linear layer" for i in range(2) if kind == "raw"}
    assert result.left == raw | {"out": "is outside of the decoder blocks"}
    assert json.loads((tmp_path / "out" / "quantization.json").read_text())["left"] == result.left


def test_a_block_that_cannot_be_is_refused_before_any_work(tmp_path):
    model = strange(tmp_path / "m", "some")
    with pytest.raises(GlqError, match="ahead reads only some of the tokens"):
        glq.quantize(model, tmp_path / "out", SETTINGS, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
