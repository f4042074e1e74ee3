"""gpt-oss's experts in vLLM: gate and up are one matrix, and they have biases (served: test_vllm_architectures.py)."""

from types import SimpleNamespace

import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file
from test_architectures import SETTINGS, written
from test_vllm import pytestmark  # noqa: F401

import glq
from glq import pipeline
from glq.checkpoint import read_config
from glq.hf_integration import load

NAME = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt-oss")
    architecture = next(a for a in ARCHITECTURES if a.name == "gpt-oss")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_calibration_windows", lambda *_: torch.randint(2, 302, (4, 32)))
        glq.quantize(written(architecture, folder / "model"), folder / "out", SETTINGS, device="cpu")
    return folder / "out"


class Layer(torch.nn.Module):
    """The experts of block 1 as a rank of vLLM has them, packed; tensors come by their names in the checkpoint."""

    def __init__(self, checkpoint, here, without=()):
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.model_executor.layers.fused_moe import MoEActivation

        from glq.vllm_integration.gpt_oss import GptOssMethod
        from glq.vllm_integration.names import JOINED

        super().__init__()
        local = {e: i for i, e in enumerate(here)}
        self.expert_map_manager = SimpleNamespace(map_global_to_local=lambda e: local.get(e, -1))
        self.expert_map = None if len(here) == 4 else torch.tensor([local.get(e, -1) for e in range(4)])
        self.activation, self.apply_router_weight_on_input = MoEActivation.SWIGLUOAI, False
        self.params_dtype = torch.float32
        config = read_config(checkpoint)
        modules = {key: config.modules[f"{NAME}.*.{name}"] for key, name in JOINED.items()}
        facts = {"has_bias": True, "is_act_and_mul": True, "num_logical_experts": 4, "swiglu_limit": 7.0}
        more = dict.fromkeys(("swiglu_alpha", "swiglu_beta", "activation_situ_beta", "activation_situ_linear_beta"))
        self.quant_method = GptOssMethod(NAME, modules, SimpleNamespace(tp_rank=0, tp_size=1, **facts, **more))
        inside, hidden = modules["w13"].out_features // 2, modules["w2"].out_features
        with set_current_vllm_config(VllmConfig()):
            self.quant_method.create_weights(self, len(here), hidden, inside, torch.float32)
        self.load(load_file(checkpoint / "model.safetensors"), here, without)

    def load(self, tensors, here, without):
        named = dict(self.named_parameters())
        for full, tensor in tensors.items():
            name = full.removeprefix(f"{NAME}.")
            if name == full or name in without:
                continue
            if name.endswith("_bias"):  # vLLM's own class copies them
                stem = "w13" if name.startswith("gate_up") else "w2"
                named[f"{stem}_bias"].copy_(tensor[here])
            else:
                named[name].weight_loader(named[name], tensor)


def swigluoai(_, output, products, **__):
    """vLLM has it for GPUs alone: gate and up in turn, as in transformers."""
    gate, up = products[:, ::2].clamp(max=7.0), products[:, 1::2].clamp(-7.0, 7.0)
    output.copy_((up + 1) * gate * torch.sigmoid(1.702 * gate))


@pytest.fixture
def packed(monkeypatch):
    from glq.vllm_integration import experts, methods

    monkeypatch.setattr(methods, "decodes_once", lambda: False)
    monkeypatch.setattr(experts, "apply_moe_activation", swigluoai)


@pytest.mark.parametrize("ranks", [[[0, 1, 2, 3]], [[0, 1], [2, 3]]], ids=["one", "ep"])
def test_the_outputs_of_packed_ranks_add_up(ranks, checkpoint, packed):
    dense = load(checkpoint, device="cpu").model.layers[1].mlp.experts
    width = read_config(checkpoint).modules[f"{NAME}.*.gate_up_proj"].in_features
    x, weights, route = torch.randn(9, width), torch.rand(9, 2), torch.rand(9, 4).topk(2).indices.int()
    y = torch.zeros(9, width)
    for here in ranks:
        layer = Layer(checkpoint, here)
        layer.quant_method.process_weights_after_loading(layer)
        assert not any(name[0].isdigit() for name, _ in layer.named_parameters())
        y += layer.quant_method.apply(layer, x, weights, route, None, None)
    z = dense(x, route.long(), weights)
    assert (y - z).norm() / z.norm() < 1e-5


@pytest.mark.parametrize(
    ("lost", "match"),
    [("down_proj_bias", "biases are missing"), ("3.gate_up_proj.codes", "has not loaded its w13 codes")],
)
def test_what_is_not_loaded_is_refused(lost, match, checkpoint, packed):
    layer = Layer(checkpoint, [0, 1, 2, 3], without=(lost,))
    with pytest.raises(glq.GlqError, match=match):
        layer.quant_method.process_weights_after_loading(layer)


def test_only_our_files_take_the_class_of_our_own():
    from glq.vllm_integration import GPT_OSS, OWN_GPT_OSS
    from glq.vllm_integration.config import GlqVllmConfig

    def updated(architecture):
        text = SimpleNamespace(architectures=[architecture], tie_word_embeddings=False)
        text.get_text_config = lambda: text
        GlqVllmConfig(None).maybe_update_config("nowhere", text)
        return text.architectures

    assert updated(GPT_OSS) == [OWN_GPT_OSS]
    assert updated("LlamaForCausalLM") == ["LlamaForCausalLM"]
