"""Mixture-of-experts models in real vLLM on the CPU: the tokens and log-probs of transformers."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import make_moe
from safetensors.torch import load_file
from test_vllm import PROMPTS, assert_same, edited, pytestmark, read, vllm  # noqa: F401

import glq
from glq.checkpoint import read_config
from glq.config import ModuleConfig
from glq.hf_integration import load


@pytest.fixture(scope="module", params=["qwen3-moe", "mixtral"])
def checkpoint(request, text_file, tmp_path_factory):
    """Gate and up in one codec and in two; an MLP of whole tiles, and of a tile and a bit."""
    folder = tmp_path_factory.mktemp(request.param)
    layers = {
        "qwen3-moe": (("*.0.*.up_proj", "e8-2"), ("*.down_proj", "trellis-4")),
        "mixtral": (("*.0.*.w3", "nested-4"),),
    }
    settings = glq.Settings(3, "nested-3", layers=layers[request.param], tokens=512, ctx=64)
    model = make_moe(folder / "model", request.param)
    glq.quantize(model, folder / "out", settings, calibration=text_file, device="cpu")
    return folder / "out"


@pytest.fixture(scope="module")
def even(text_file, tmp_path_factory):
    """A Mixtral that can be cut for two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("even")
    settings = glq.Settings(3, "nested-3", layers=(("*.1.*.w3", "nested-4"),), tokens=512, ctx=64, tensor_parallel=2)
    glq.quantize(make_moe(folder / "model", "mixtral"), folder / "out", settings, calibration=text_file, device="cpu")
    return folder / "out"


@pytest.mark.parametrize("options", [{}, {"packed": True}], ids=["decoded", "packed"])
def test_a_tiny_model_is_transformers(options, checkpoint, vllm):  # noqa: F811
    assert_same(vllm(checkpoint, PROMPTS, **options), load(checkpoint, device="cpu"), PROMPTS, 1e-4)


@pytest.mark.parametrize("checkpoint", ["qwen3-moe"], indirect=True)
def test_packed_experts_are_compiled(checkpoint, vllm):  # noqa: F811
    answer = vllm(checkpoint, PROMPTS, packed=True, enforce_eager=False)
    assert_same(answer, load(checkpoint, device="cpu"), PROMPTS, 1e-4)


def test_two_ranks_share_each_expert(even, vllm):  # noqa: F811
    answer = vllm(even, PROMPTS, tensor_parallel_size=2)
    assert_same(answer, load(even, device="cpu"), PROMPTS, 1e-4)


def test_two_ranks_share_out_the_experts(even, vllm):  # noqa: F811
    """Weights stay packed then, on a CPU, too."""
    answer = vllm(even, PROMPTS, tensor_parallel_size=2, enable_expert_parallel=True)
    assert_same(answer, load(even, device="cpu"), PROMPTS, 1e-4)


class Layer(torch.nn.Module):
    """The experts of block 1 as a rank of vLLM has them, packed."""

    def __init__(self, checkpoint, rank, ranks, experts, dtype):
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.model_executor.layers.fused_moe import MoEActivation

        from glq.vllm_integration.experts import GlqExpertsMethod

        super().__init__()
        local = {e: i for i, e in enumerate(experts)}
        self.expert_map_manager = SimpleNamespace(map_global_to_local=lambda e: local.get(e, -1))
        self.expert_map = None if len(experts) == 4 else torch.tensor([local.get(e, -1) for e in range(4)])
        self.activation, self.apply_router_weight_on_input = MoEActivation.SILU, False
        self.params_dtype = dtype
        name = "model.layers.1.block_sparse_moe.experts"
        config = read_config(checkpoint)
        modules = {key: config.modules[f"{name}.*.{key}"] for key in ("w1", "w2", "w3")}
        facts = {"has_bias": False, "is_act_and_mul": True, "num_logical_experts": 4, "swiglu_limit": None}
        more = dict.fromkeys(("swiglu_alpha", "swiglu_beta", "activation_situ_beta", "activation_situ_linear_beta"))
        moe = SimpleNamespace(tp_rank=rank, tp_size=ranks, **facts, **more)
        self.quant_method = GlqExpertsMethod(name, modules, moe)
        with set_current_vllm_config(VllmConfig()):
            self.quant_method.create_weights(self, len(experts), 96, 128 // ranks, dtype)
        for full, tensor in load_file(checkpoint / "model.safetensors").items():
            if full.startswith(f"{name}."):
                expert, key, kind = full.removeprefix(f"{name}.").split(".")
                param = getattr(self, f"{'w2' if key == 'w2' else 'w13'}_{kind}")
                param.weight_loader(param, tensor, full, shard_id=key, expert_id=int(expert))

    def forward(self, x, weights, experts):
        return self.quant_method.apply(self, x, weights, experts, None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [[[0, 1, 2, 3]], [[0, 1, 2, 3]] * 2, [[0, 1], [2, 3]]], ids=["one", "tp", "ep"])
def test_the_outputs_of_packed_ranks_add_up(experts, dtype, even, monkeypatch):
    """Block 1, whose gate and up have different codecs; in bf16 with what that rounds."""
    from glq.vllm_integration import methods

    monkeypatch.setattr(methods, "decodes_once", lambda: False)
    x, weights = torch.randn(9, 96).to(dtype), torch.rand(9, 2)
    route = torch.rand(9, 4).topk(2).indices.int()
    dense = load(even, device="cpu").model.layers[1].mlp.experts
    ranks = 1 if len(experts) == 1 or len(experts[0]) < 4 else 2
    y = torch.zeros(9, 96)
    for rank, mine in enumerate(experts):
        layer = Layer(even, rank if ranks == 2 else 0, ranks, mine, dtype)
        layer.quant_method.process_weights_after_loading(layer)
        y += layer(x, weights, route).float()
    z = dense(x.float(), route.long(), weights)
    assert (y - z).norm() / z.norm() < (1e-5 if dtype == torch.float32 else 0.02)


def test_what_is_not_loaded_is_refused(even):
    layer = Layer(even, 0, 1, [0, 1, 2, 3], torch.float32)
    layer.w2_scale.glq_missing.add((3, 0))
    with pytest.raises(glq.GlqError, match="vLLM has not loaded its w2 scale"):
        layer.quant_method.process_weights_after_loading(layer)


def test_random_codes_are_served_from_a_config_alone(even, vllm, tmp_path):  # noqa: F811
    shutil.copy(even / "config.json", tmp_path)
    answer = vllm(tmp_path, PROMPTS, packed=True, load_format="dummy", skip_tokenizer_init=True)
    assert isinstance(answer, dict), answer[-6000:]
    assert torch.tensor(answer["logprobs"]).isfinite().all()


@pytest.mark.parametrize("checkpoint", ["qwen3-moe"], indirect=True)
def test_a_size_that_does_not_fit_is_refused_before_weights_load(checkpoint, vllm):  # noqa: F811
    """Without --tp, one block of the rotation covers all that down reads; an MLP of 72 is not two times whole tiles."""
    output = vllm(checkpoint, tensor_parallel_size=2)
    assert isinstance(output, str)
    assert "GlqError: model.layers.0." in output
    assert "Loading safetensors" not in output


@pytest.fixture
def method(even, read):  # noqa: F811
    """The method of a layer's experts, by the config and what vLLM's layer says of itself."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    def of(prefix="model.layers.0.block_sparse_moe.experts", change=None, experts=4):
        config, layer = read(even), RoutedExperts.__new__(RoutedExperts)
        if change is not None:
            change(config.glq.modules)
        names = {"ckpt_gate_proj_name": "w1", "ckpt_down_proj_name": "w2", "ckpt_up_proj_name": "w3"}
        moe = SimpleNamespace(has_bias=False, is_act_and_mul=True, num_logical_experts=experts)
        layer.__dict__ |= names | {"moe_config": moe}
        return config.get_quant_method(layer, prefix)

    return of


def test_experts_that_are_not_quantized_are_left_to_vllm(method):
    assert method("model.layers.7.block_sparse_moe.experts") is None


@pytest.mark.parametrize(
    ("change", "experts", "match"),
    [
        (lambda m: m.pop("model.layers.0.block_sparse_moe.experts.*.w3"), 4, "a gate, an up and a down projection"),
        (None, 8, "has not the 8 experts of the model"),
        (
            lambda m: [m.update({k.replace(".w", ".v"): m.pop(k)}) for k in list(m) if ".0.block" in k],
            4,
            "not by the names",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, experts, match, method):
    with pytest.raises(glq.GlqError, match=match) as info:
        method(change=change, experts=experts)
    assert "\n" not in str(info.value)


def test_signs_must_be_the_same_for_all_experts(even):
    from glq.vllm_integration.experts import ExpertsLoader
    from glq.vllm_integration.parts import Rank, cut

    parts = cut({"w": ModuleConfig("nested-3", 96, 128, 96)}, [128], 96, Rank(0, 1))
    param = torch.nn.Parameter(torch.zeros(1, 12, dtype=torch.uint8), requires_grad=False)
    param.glq_missing = {(0, 0), (1, 0)}
    load_signs = ExpertsLoader("signs", parts, ("w2",), 2, lambda e: e if e < 2 else -1)
    signs = torch.arange(12, dtype=torch.uint8)
    assert load_signs(param, signs, "w2_signs", "w2", 7, return_success=True) is False
    assert load_signs(param, signs, "w2_signs", "w2", 0, return_success=True) is True
    with pytest.raises(glq.GlqError, match="different signs"):
        load_signs(param, signs + 1, "w2_signs", "w2", 1)
    load_signs(param, signs, "w2_signs", "w2", 1)
    assert not param.glq_missing
    assert torch.equal(param.data[0], signs)


def test_names_are_mapped_as_tensors_are(even, read):  # noqa: F811
    """vLLM's Mixtral takes gate_proj, up_proj and down_proj for w1, w3 and w2."""
    from vllm.model_executor.models.mixtral import MixtralForCausalLM

    config = read(even)
    before = set(config.glq.modules)
    config.apply_vllm_mapper(MixtralForCausalLM.hf_to_vllm_mapper.get_rename_mapper())
    assert set(config.glq.modules) == before
    config.glq.modules["model.layers.0.block_sparse_moe.experts.*.gate_proj"] = next(iter(config.glq.modules.values()))
    config.apply_vllm_mapper(MixtralForCausalLM.hf_to_vllm_mapper.get_rename_mapper())
    assert not [name for name in config.glq.modules if name.endswith("gate_proj")]


def test_a_broken_expert_is_refused(even, vllm, tmp_path):  # noqa: F811
    from safetensors.torch import save_file

    copied = shutil.copytree(even, tmp_path / "copy")
    tensors = load_file(copied / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.2.w2.scale"].fill_(torch.inf)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    output = vllm(copied)
    assert isinstance(output, str)
    assert "experts: scales are NaN or infinite" in output
    assert json.loads((copied / "config.json").read_text())["quantization_config"]["tensor_parallel"] == 2
