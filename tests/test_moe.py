"""Mixture-of-experts models end to end: what calibration reads, what is written, and what transformers loads of it."""

import copy
import json
import shutil

import pytest
import torch
import transformers
from conftest import MOE, make_moe, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import glq
import glq.hf_integration
from glq import GlqError, Settings
from glq.checkpoint import inspect
from glq.experts import DenseExperts, quantizable, refuse_unknown
from glq.linear import QuantLinear
from glq.moments import PRIOR, Routed, expert_moments, moments_of
from glq.quant_experts import QuantExperts
from glq.source import SourceModel

KINDS = ("qwen3-moe", "mixtral")
LAYERS = (("*.down_proj", "nested-4"), ("*.1.*.w2", "nested-4"), ("*.0.mlp.*.up_proj", "e8-2"))
IDS = torch.arange(60)[None]


def load(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def moe(kind, tmp_path_factory):
    return make_moe(tmp_path_factory.mktemp(kind) / "model", kind)


@pytest.fixture(scope="module")
def quantized(kind, moe, text_file, tmp_path_factory):
    """Result and directory; several codecs, gate and up of one block in two."""
    layers = LAYERS[:1] + LAYERS[2:] if kind == "qwen3-moe" else LAYERS[1:2]
    settings = Settings(3, "nested-3", layers=layers, tokens=512, ctx=64)
    out = tmp_path_factory.mktemp(kind) / "out"
    return glq.quantize(moe, out, settings, calibration=text_file, device="cpu")


def fake(moe, model):
    """The original with every weight replaced by its dequantized one."""
    dense = load(moe)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            dense.get_submodule(name).weight.data = module.packed.dequantize()
        elif isinstance(module, QuantExperts):
            experts = dense.get_submodule(name)
            experts.gate_up_proj.data = torch.cat([part.dequantize(torch.float32) for part in module.parts], 1)
            experts.down_proj.data = module.down_proj.dequantize(torch.float32)
    return dense


def test_reloaded_logits_equal_the_fake_quantized_model(moe, quantized):
    model = load(quantized.path)
    assert sum(isinstance(m, QuantExperts) for m in model.modules()) == 2
    y, z = model(IDS).logits, fake(moe, model)(IDS).logits
    assert (y - z).abs().max() / z.abs().max() < 1e-5


def test_in_memory_weights_are_the_ones_written(moe, text_file, monkeypatch, tmp_path):
    """Calibration went on with what the checkpoint decodes to, to the bit, each expert with its own."""
    from glq import calibration

    plain, twins = calibration.groups_of, {}

    def spy(prefix, source, twin, *rest):
        twins[prefix] = twin
        return plain(prefix, source, twin, *rest)

    monkeypatch.setattr(calibration, "groups_of", spy)
    settings = Settings(3, "nested-3", tokens=512, ctx=64)
    glq.quantize(moe, tmp_path / "out", settings, calibration=text_file, device="cpu")
    model = load(tmp_path / "out")
    assert len(twins) == 2
    for prefix, twin in twins.items():
        experts, dense = model.get_submodule(prefix).mlp.experts, twin.mlp.experts
        outer = torch.cat([part.dequantize(torch.float32) for part in experts.parts], 1)
        assert torch.equal(outer, dense.gate_up_proj.weight)
        assert torch.equal(experts.down_proj.dequantize(torch.float32), dense.down_proj.weight)


def test_more_bits_lose_less_and_it_stays_close(moe, quantized, text_file, tmp_path):
    """Routing changes where rounding errors meet a tie, so logits of random models are compared loosely."""
    better = glq.quantize(
        moe, tmp_path / "out", Settings(4, "nested-4", tokens=512, ctx=64), calibration=text_file, device="cpu"
    )
    worse = {name: error for name, error in quantized.errors.items() if better.errors[name] > 0.9 * error}
    assert all("down_proj" in name or (".1." in name and name.endswith("w2")) for name in worse)
    z = load(moe)(IDS).logits
    off = [(load(path)(IDS).logits - z).norm() / z.norm() for path in (tmp_path / "out", quantized.path)]
    assert off[0] < min(0.45, 0.8 * off[1])


def test_names_are_those_of_the_original(kind, moe, quantized):
    summary, original = inspect(quantized.path), set(load_file(moe / "model.safetensors"))
    names = {name.removesuffix(f".{end}") for name in summary.tensors for end in ("codes", "scale", "signs", "weight")}
    assert {f"{n}.weight" for n in names if f"{n}.weight" in original} == original
    entries = [name for name, module in summary.config.modules.items() if module.experts]
    assert len(entries) == 6
    assert all(f"{name.replace('*', '3')}.weight" in original for name in entries)
    gates = [name for name in summary.tensors if "gate.weight" in name]
    assert len(gates) == 2  # the routers


def test_experts_share_signs_and_bits_are_counted_from_the_files(kind, quantized):
    summary, tensors = inspect(quantized.path), load_file(quantized.path / "model.safetensors")
    first, second = ("gate_proj", "up_proj") if kind == "qwen3-moe" else ("w1", "w3")
    prefix = f"model.layers.1.{'mlp' if kind == 'qwen3-moe' else 'block_sparse_moe'}.experts"
    signs = tensors[f"{prefix}.0.{first}.signs"]
    assert all(torch.equal(tensors[f"{prefix}.{e}.{part}.signs"], signs) for e in range(4) for part in (first, second))
    packed = [t for name, t in tensors.items() if name.endswith((".codes", ".scale", ".signs"))]
    assert summary.quantized_bytes == sum(t.numel() * t.element_size() for t in packed)
    weights = sum(
        tensors[f"{n}.scale"].numel() * m.in_features for e, m in summary.config.modules.items() for n in m.names(e)
    )
    assert summary.bits == pytest.approx(8 * summary.quantized_bytes / weights) == pytest.approx(quantized.bits)


def test_generate_save_dequantize_and_copy(quantized, tmp_path):
    model = load(quantized.path)
    y, tokens = model(IDS).logits, model.generate(IDS[:, :4], max_new_tokens=8, do_sample=False)
    assert torch.equal(copy.deepcopy(model)(IDS).logits, y)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(IDS).logits, y)
    assert inspect(tmp_path / "saved").bits == inspect(quantized.path).bits
    dense = glq.load(quantized.path, device="cpu")
    assert not [m for m in dense.modules() if isinstance(m, QuantExperts)]
    assert (dense(IDS).logits - y).abs().max() / y.abs().max() < 1e-5
    assert torch.equal(dense.generate(IDS[:, :4], max_new_tokens=8, do_sample=False), tokens)
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(load(tmp_path / "dense")(IDS).logits, dense(IDS).logits)


def test_half_precision(quantized):
    model = load(quantized.path, torch.bfloat16)
    x, route = torch.randn(10, 96).bfloat16(), torch.randint(0, 4, (10, 2))
    experts, exact = model.model.layers[1].mlp.experts, load(quantized.path).model.layers[1].mlp.experts
    weights = torch.rand(10, 2)
    y, z = experts(x, route, weights), exact(x.float(), route, weights)
    assert y.dtype == torch.bfloat16
    assert (y.float() - z).norm() / z.norm() < 0.02


def test_gate_and_up_of_one_codec_are_one_product(kind, quantized):
    joint = [layer.mlp.experts._joint is not None for layer in load(quantized.path).model.layers]
    assert joint == ([False, True] if kind == "qwen3-moe" else [True, True])


def test_torch_compile_takes_any_number_of_tokens(quantized):
    experts = load(quantized.path).model.layers[1].mlp.experts
    compiled = torch.compile(experts, backend="aot_eager", dynamic=True, fullgraph=True)
    for tokens in (3, 8, 21):
        args = torch.randn(tokens, 96), torch.randint(0, experts.count, (tokens, 2)), torch.rand(tokens, 2)
        torch.testing.assert_close(compiled(*args), experts(*args))


def test_an_expert_of_another_device_counts_nothing(quantized):
    experts = load(quantized.path).model.layers[1].mlp.experts
    x, weights = torch.randn(5, 96), torch.rand(5, 2)
    both, none = torch.tensor([[0, 1]] * 5), torch.tensor([[0, experts.count]] * 5)
    y = experts(x, both, torch.tensor([[1.0, 0.0]] * 5) * weights)
    torch.testing.assert_close(experts(x, none, weights), y)


def rewritten(quantized, folder, change):
    copied = shutil.copytree(quantized.path, folder / "copy")
    tensors = load_file(copied / "model.safetensors")
    config = json.loads((copied / "config.json").read_text())
    change(tensors, config["quantization_config"]["modules"])
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    (copied / "config.json").write_text(json.dumps(config))
    return copied


def entry_of(modules):
    return next(name for name, module in modules.items() if "experts" in module)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t, m: t.pop(f"{entry_of(m).replace('*', '3')}.codes"), "3.*codes is missing"),
        (lambda t, m: t.update({f"{entry_of(m).replace('*', '2')}.scale": torch.zeros(3).half()}), "should be F16"),
        (lambda t, m: t[f"{entry_of(m).replace('*', '2')}.scale"].fill_(torch.nan), "NaN or infinite"),
        (lambda t, m: t[f"{entry_of(m).replace('*', '2')}.signs"].bitwise_not_(), "different signs"),
        (lambda t, m: m[entry_of(m)].update(experts=3), "config.json was changed"),
        (lambda t, m: m[entry_of(m)].update(experts=9), "config.json was changed"),
        (lambda t, m: m[entry_of(m)].update(experts=0), "positive integer, found 0"),
        (lambda t, m: m[entry_of(m)].pop("experts"), r"has one \* where"),
        (lambda t, m: m.update({entry_of(m).replace("*.", ""): m.pop(entry_of(m))}), r"has one \* where"),
        (lambda t, m: m.pop(entry_of(m)), "config.json was changed"),
    ],
)
def test_what_is_wrong_is_refused(change, match, quantized, tmp_path):
    with pytest.raises(GlqError, match=match) as info:
        load(rewritten(quantized, tmp_path, change))
    assert "\n" not in str(info.value)


def test_a_source_that_keeps_experts_as_3d_parameters_gives_the_same_bytes(text_file, tmp_path):
    """As transformers has them in memory; the checkpoint's names are then made up."""
    moe = make_moe(tmp_path / "model", "qwen3-moe", num_hidden_layers=1)
    stacked = shutil.copytree(moe, tmp_path / "stacked")
    save_file(
        {k: v.contiguous() for k, v in load(moe, torch.bfloat16).state_dict().items()},
        stacked / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(stacked / "model.safetensors")
    settings = Settings(3, "nested-3", tokens=256, ctx=64)
    for name in ("model", "stacked"):
        glq.quantize(tmp_path / name, tmp_path / f"out-{name}", settings, calibration=text_file, device="cpu")
    one, other = (load_file(tmp_path / f"out-{name}" / "model.safetensors") for name in ("model", "stacked"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_source_without_one_of_its_experts_is_refused(moe, tmp_path):
    broken = shutil.copytree(moe, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    gone = next(name for name in tensors if "experts.2." in name)
    save_file({k: v for k, v in tensors.items() if k != gone}, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GlqError, match="lacks some of the [46] experts of model.layers.0.mlp.experts"):
        SourceModel(broken)


def test_routers_stay_and_shared_experts_are_quantized(tmp_path):
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**MOE | sizes | {"num_hidden_layers": 1}))
    experts = model.model.layers[0].mlp.experts
    model.model.layers[0].mlp.experts = DenseExperts(experts)
    found = {name.rpartition("mlp.")[2] for name, _ in quantizable(model.model.layers[0]) if "mlp." in name}
    shared = {f"shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    assert found == shared | {"experts.gate_up_proj", "experts.down_proj"}


FEW = {"num_hidden_layers": 1, "num_local_experts": 4, "intermediate_size": 64}


def test_a_source_with_names_of_its_own_for_stacked_experts(text_file, tmp_path):
    """Granite's files say input_linear, which says nothing of experts."""
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    sizes = {name: value for name, value in MOE.items() if name != "head_dim"}
    model = GraniteMoeForCausalLM(GraniteMoeConfig(**sizes | FEW)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    settings = Settings(3, "nested-3", tokens=256, ctx=64)
    glq.quantize(tmp_path / "model", tmp_path / "out", settings, calibration=text_file, device="cpu")
    assert "model.layers.0.block_sparse_moe.input_linear.weight" in load_file(tmp_path / "model" / "model.safetensors")
    names = inspect(tmp_path / "out").tensors
    assert not [name for name in names if "input_linear" in name]
    assert "model.layers.0.block_sparse_moe.experts.3.gate_proj.codes" in names
    y, z = load(tmp_path / "out")(IDS).logits, glq.load(tmp_path / "out", device="cpu")(IDS).logits
    assert (y - z).abs().max() / z.abs().max() < 1e-5


def test_experts_of_unknown_kinds_are_refused(tmp_path):
    config = transformers.Llama4TextConfig(**MOE | FEW | {"moe_layers": [0], "layer_types": None})
    transformers.Llama4ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(GlqError, match="a form that glq does not know yet") as info:
        SourceModel(tmp_path)
    assert "\n" not in str(info.value)


def test_experts_with_more_parameters_are_refused(tmp_path):
    make_moe(tmp_path / "model", "qwen3-moe")
    experts = SourceModel(tmp_path / "model").module("model.layers.0.mlp.experts").rest
    for key in ("gate_up_proj", "down_proj", "gate_up_scale"):
        experts.register_parameter(key, torch.nn.Parameter(torch.zeros(6, 4, 4)))
    with pytest.raises(GlqError, match="experts of type Qwen3MoeExperts have gate_up_scale, which glq cannot"):
        refuse_unknown("mlp.experts", experts)


def routed(of_pairs, tokens=40, k=2, experts=5, width=8):
    rows = tokens * (k if of_pairs else 1)
    numbers = [torch.rand(tokens, experts).topk(k).indices for _ in range(2)]
    return Routed(torch.randn(rows, width), numbers[0], torch.randn(rows, width), numbers[1], of_pairs)


@pytest.mark.parametrize("of_pairs", [False, True])
def test_moments_are_of_the_rows_that_came_to_an_expert(of_pairs):
    """In the quantized model; drift counts where the same expert read the token in the reference."""
    one, (tokens, k) = routed(of_pairs), (40, 2)
    for expert in range(5):
        hessian, drift, count = torch.zeros(8, 8), torch.zeros(8, 8), 0
        for t in range(tokens):
            for slot in range(k):
                if one.experts_hat[t, slot] == expert:
                    x_hat = one.x_hat[t * k + slot] if of_pairs else one.x_hat[t]
                    same = (one.experts[t] == expert).nonzero().flatten().tolist()
                    x = one.x[t] if not of_pairs else one.x[t * k + same[0]] if same else x_hat
                    hessian += x_hat[:, None] * x_hat
                    drift += (x - x_hat)[:, None] * x_hat
                    count += 1
        moments = moments_of([one.of(expert)])
        torch.testing.assert_close(moments.hessian, hessian / count)
        torch.testing.assert_close(moments.drift, drift / count)


@pytest.mark.parametrize("of_pairs", [False, True])
def test_an_expert_without_tokens_takes_the_average_and_one_with_many_hardly_any(of_pairs):
    inputs = [routed(of_pairs, tokens=4000, experts=2, k=1) for _ in range(2)]
    found = list(expert_moments(inputs, 3))
    assert [count for count, _ in found][2] == 0
    assert sum(count for count, _ in found) == 8000
    average = moments_of(one.of_all() for one in inputs)
    torch.testing.assert_close(found[2][1].hessian, average.hessian)
    torch.testing.assert_close(found[2][1].drift, average.drift)
    own, share = moments_of(one.of(0) for one in inputs), PRIOR * 8 / (PRIOR * 8 + found[0][0])
    torch.testing.assert_close(found[0][1].hessian, own.hessian * (1 - share) + average.hessian * share)
    torch.testing.assert_close(found[0][1].drift, own.drift * (1 - share) + average.drift * share)


def test_experts_that_calibration_does_not_reach_are_named_and_rounded(text_file, tmp_path):
    moe = make_moe(tmp_path / "model", "qwen3-moe", num_hidden_layers=1)
    tensors = load_file(moe / "model.safetensors")
    router = tensors["model.layers.0.mlp.gate.weight"]
    router[3:] = torch.stack([-router[0], -router[1], torch.zeros_like(router[0])])  # the last is never among the two
    save_file(tensors, moe / "model.safetensors", metadata={"format": "pt"})
    settings = Settings(3, "nested-3", tokens=512, ctx=64)
    result = glq.quantize(moe, tmp_path / "out", settings, calibration=text_file, device="cpu")
    assert result.unreached["model.layers.0.mlp.experts.5"] == 0
    assert all(count < 96 for count in result.unreached.values())
    counts = json.loads((tmp_path / "out" / "quantization.json").read_text())["expert_tokens"]
    assert counts["model.layers.0.mlp.experts.*.gate_proj"][5] == 0
    assert sum(counts["model.layers.0.mlp.experts.*.down_proj"]) == 2 * 512
    experts = load(tmp_path / "out").model.layers[0].mlp.experts
    wrong = experts.down_proj.dequantize(torch.float32)[5] - tensors["model.layers.0.mlp.experts.5.down_proj.weight"]
    assert wrong.norm() / tensors["model.layers.0.mlp.experts.5.down_proj.weight"].norm() < 0.25


def test_experts_that_compute_something_else_are_refused(moe, text_file, tmp_path, monkeypatch):
    experts = type(load(moe).model.layers[0].mlp.experts)
    plain = experts.forward
    monkeypatch.setattr(experts, "forward", lambda self, *args: 2 * plain(self, *args))
    with pytest.raises(GlqError, match="more than two products and an activation"):
        glq.quantize(moe, tmp_path / "out", Settings(3, tokens=256, ctx=64), calibration=text_file, device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_plan_and_tuning_take_experts_along(text_file, tmp_path):
    moe = make_moe(tmp_path / "model", "mixtral", num_hidden_layers=1)
    plan = glq.make_plan(moe, 3, Settings(3, tokens=1024, ctx=64), calibration=text_file, device="cpu")
    weights = {group.layers[0].rpartition(".")[2]: group.weights for group in plan.groups}
    assert (weights["w1"], weights["w2"]) == (2 * 4 * 96 * 128, 4 * 96 * 128)
    layers = tuple((name, "nested-3") for name, _ in plan.layers)
    settings = Settings(3, layers=layers, tokens=512, ctx=64)
    glq.quantize(moe, tmp_path / "out", settings, calibration=text_file, device="cpu")
    result = glq.tune(
        tmp_path / "out", tmp_path / "tuned", moe, glq.TuneSettings(8, 2, 0, 64, 2e-3), text=text_file, device="cpu"
    )
    assert result.after < result.before
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "tuned"))
    assert one.keys() == other.keys()
    assert not torch.equal(one["model.norm.weight"].float(), other["model.norm.weight"].float())
    assert load(tmp_path / "tuned")(IDS).logits.isfinite().all()
