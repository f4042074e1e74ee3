"""Real vLLM on the CPU, each engine in a process of its own: the tokens and log-probs of transformers."""

import json
import logging
import os
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import add_biases, make_model
from transformers import AutoTokenizer

import glq
from glq.hf_integration import load

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm")

JOB = Path(__file__).with_name("vllm_job.py")


def environment(processes: bool = False) -> dict[str, str]:
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    preload = {"LD_PRELOAD": str(openmp)} if openmp.is_file() else {}
    return (
        os.environ
        | preload
        | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes)),
        }
    )


@cache
def importing(python_path: str) -> subprocess.Popen:
    """A process that runs jobs of vllm_job.py, and imports vLLM once: ten seconds. It ends with this one."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, JOB], env=environment(), text=True, **pipes)


@pytest.fixture
def vllm(tmp_path):
    """Runs a job of vllm_job.py: its answer, or its output if it failed."""

    def run(
        model,
        prompts=((0, 5, 9),),
        tokens=8,
        packed=False,
        as_on_gpu=False,
        count=False,
        lora=None,
        writes=False,
        **llm,
    ):
        llm = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8} | llm
        job = {"model": str(model), "llm": llm, "prompts": prompts, "tokens": tokens, "packed": packed}
        job |= {"as_on_gpu": as_on_gpu, "count": count, "lora": lora and str(lora), "writes": writes and str(tmp_path)}
        (tmp_path / "job.json").write_text(json.dumps(job))
        files = {name: str(tmp_path / f"{name}.json") for name in ("job", "answer", "log")}
        Path(files["log"]).write_text("")
        starter = importing(os.environ.get("PYTHONPATH", ""))
        starter.stdin.write(json.dumps(files | {"environment": environment()}) + "\n")
        starter.stdin.flush()
        if starter.stdout.readline() != "0\n":
            return Path(files["log"]).read_text()
        answer = json.loads(Path(files["answer"]).read_text())
        if writes:  # each rank has heads of its own
            ranks = [torch.load(path) for path in sorted(tmp_path.glob("*.writes.pt"))]
            answer["writes"] = [torch.cat(layer, -2) for layer in zip(*ranks, strict=True)]
        return answer

    return run


def assert_same(answer, model, prompts, within):
    """Tokens are those that transformers finds most likely after the same text, or tie with them; so are log-probs."""
    assert isinstance(answer, dict), answer[-6000:]
    for prompt, tokens, logprobs in zip(prompts, answer["tokens"], answer["logprobs"], strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float()
        expected = logits.log_softmax(-1)
        chosen = expected[torch.arange(len(tokens)), tokens]
        assert (chosen - torch.tensor(logprobs)).abs().max() < within
        assert (expected.max(-1).values - chosen).max() < 1e-4


@pytest.fixture(scope="module", params=["tied", "untied"])
def checkpoint(request, text_file, tmp_path_factory):
    """A tiny model with biases, every kind of codec, embeddings and head at 4 bits."""
    folder = tmp_path_factory.mktemp(request.param)
    tied = request.param == "tied"
    model = make_model(
        folder / "model", hidden_size=128, attention_bias=True, mlp_bias=not tied, tie_word_embeddings=tied
    )
    add_biases(model)
    layers = (("*.k_proj", "trellis-4"), ("*.gate_proj", "nested-4"), ("*.0.mlp.down_proj", "e8-2"))
    settings = glq.Settings(3, tokens=512, ctx=64, layers=layers, embeddings=4, head=4 if tied else 2)
    glq.quantize(model, folder / "out", settings, calibration=text_file, device="cpu")
    return folder / "out"


PROMPTS = [[0, 5 + i, 9, 30 + i, 200 - i] for i in range(4)]


@pytest.mark.parametrize("options", [{}, {"packed": True}], ids=["decoded", "packed"])
def test_a_tiny_model_is_transformers(options, checkpoint, vllm):
    assert_same(vllm(checkpoint, PROMPTS, **options), load(checkpoint, device="cpu"), PROMPTS, 1e-4)


@pytest.mark.parametrize("checkpoint", [pytest.param("tied", marks=pytest.mark.slow), "untied"], indirect=True)
def test_a_compiled_tiny_model_is_transformers(checkpoint, vllm):
    answer = vllm(checkpoint, PROMPTS, packed=True, enforce_eager=False)
    assert_same(answer, load(checkpoint, device="cpu"), PROMPTS, 1e-4)


def test_two_ranks_are_one(tiny_even, vllm):
    answer = vllm(tiny_even, PROMPTS, tensor_parallel_size=2, additional_config={"glq_all_reduce": True})
    assert_same(answer, load(tiny_even, device="cpu"), PROMPTS, 1e-4)


def test_random_codes_are_served_from_a_config_alone(checkpoint, vllm, tmp_path):
    """What bench/serve.py does."""
    shutil.copy(checkpoint / "config.json", tmp_path)
    answer = vllm(tmp_path, PROMPTS, packed=True, load_format="dummy", skip_tokenizer_init=True)
    assert isinstance(answer, dict), answer[-6000:]
    assert torch.tensor(answer["logprobs"]).isfinite().all()


def test_a_size_that_does_not_fit_is_refused_before_weights_load(checkpoint, vllm):
    """A vocabulary of 302, padded by vLLM to 320, is 5 tiles."""
    output = vllm(checkpoint, tensor_parallel_size=2)
    assert isinstance(output, str)
    assert "GlqError: model.embed_tokens: shards of 160 rows would cut tiles of 64 rows" in output
    assert "Loading safetensors" not in output


@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_on_quantized_layers(packed, checkpoint, vllm, tmp_path):
    """As transformers with the adapter's products added to the layers' outputs."""
    from safetensors.torch import save_file

    model = load(checkpoint, device="cpu")
    tensors = {}
    for name, layer in model.named_modules():
        if name.endswith(("q_proj", "v_proj", "down_proj")):
            a, b = torch.randn(8, layer.in_features) / 8, torch.randn(layer.out_features, 8) / 8
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            layer.weight.data += 2 * b @ a
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    targets = ["q_proj", "v_proj", "down_proj"]
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": targets, "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    answer = vllm(checkpoint, PROMPTS, packed=packed, lora=tmp_path, enable_lora=True, max_lora_rank=8)
    assert_same(answer, model, PROMPTS, 1e-3)


def edited(checkpoint, folder, change):
    copy = shutil.copytree(checkpoint, folder / "copy")
    config = json.loads((copy / "config.json").read_text())
    change(config["quantization_config"])
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_a_bad_checkpoint_is_refused_before_weights_load(checkpoint, vllm, tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    output = vllm(edited(checkpoint, tmp_path, lambda q: q["modules"][name].update(codec="trellis-2")))
    assert isinstance(output, str)
    assert f"{name}.codes should be U8" in output
    assert "Loading safetensors" not in output


@pytest.fixture
def read():
    """What vLLM does with a quantization_config and a directory before it builds the model."""
    from glq.vllm_integration.config import GlqVllmConfig

    def check(folder):
        config = GlqVllmConfig.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
        config.maybe_update_config(str(folder))
        return config

    return check


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda q: q.update(format_version=9), "format version 9"),
        (lambda q: q.update(extra=1), "unknown keys extra"),
        (lambda q: q["modules"].update(ghost=next(iter(q["modules"].values()))), "tensor ghost.codes is missing"),
    ],
)
def test_what_is_wrong_is_one_line(change, match, checkpoint, read, tmp_path):
    with pytest.raises(glq.GlqError, match=match) as info:
        read(edited(checkpoint, tmp_path, change))
    assert "\n" not in str(info.value)


def test_layers_that_are_half_quantized_are_refused(checkpoint, read, tmp_path):
    config = read(checkpoint)
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert len(config.modules_of("model.layers.0.self_attn.qkv_proj")) == 3
    assert config.modules_of("model.layers.0.mlp.router") == {}
    del config.glq.modules["model.layers.0.self_attn.k_proj"]
    with pytest.raises(glq.GlqError, match="fuses model.layers.0.self_attn.k_proj, which is not quantized"):
        config.modules_of("model.layers.0.self_attn.qkv_proj")


@pytest.mark.parametrize(("version", "lines"), [("0.32.7", 0), ("0.33.0", 1), ("0.320.1", 1)])
def test_other_versions_are_said(version, lines, checkpoint, read, monkeypatch):
    import vllm

    said = []
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr("glq.vllm_integration.config._log.warning", lambda text, *values: said.append(text % values))
    read(checkpoint)
    assert len(said) == lines
    assert all(version in line and "0.32.x" in line and "\n" not in line for line in said)


def test_a_vllm_without_the_interface_is_left_alone(monkeypatch):
    from glq.vllm_integration import register

    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.quantization", None)
    said = []
    monkeypatch.setattr(logging.getLogger("vllm.glq"), "error", lambda text, *values: said.append(text % values))
    register()
    assert len(said) == 1
    assert "tested with 0.32.x" in said[0]


TEXTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):",
    "Water boils at",
    "The first president of the United States",
    "To be or not to be",
    "In 1969, the first",
    "A recipe for bread:",
)


@pytest.mark.slow
def test_smollm2(smollm2, vllm, tmp_path):
    """At 2, 3 and 4 bits with a quantized lm_head; a quarter of an hour, most of it for quantizing."""
    layers = (
        ("*.v_proj", "nested-4"),
        ("*.gate_proj", "e8-2"),
        ("*.layers.?.mlp.down_proj", "trellis-2"),
        ("*.layers.[0-4].self_attn.k_proj", "trellis-4"),
    )
    settings = glq.Settings(3, "nested-3", layers=layers, tokens=2048, ctx=512, head=4)
    glq.quantize(smollm2, tmp_path / "out", settings, device="cpu")
    prompts = tokenized(smollm2)
    assert_same(vllm(tmp_path / "out", prompts, 64), load(tmp_path / "out", device="cpu"), prompts, 1e-3)


@pytest.mark.slow
def test_gemma3_on_two_ranks(vllm, tmp_path):
    """Gemma-3-270M, where demo/gemma3-270m has it."""
    model = Path(__file__).parent.parent / "demo" / "gemma3-270m"
    if not (model / "config.json").is_file():
        pytest.skip("needs demo/gemma3-270m")
    layers = (("*.v_proj", "nested-4"), ("*.gate_proj", "e8-2"))
    settings = glq.Settings(3, "nested-3", layers=layers, tokens=2048, ctx=512, tensor_parallel=2)
    glq.quantize(model, tmp_path / "out", settings, device="cpu")
    prompts = tokenized(model)
    one, two = (vllm(tmp_path / "out", prompts, 64, tensor_parallel_size=n) for n in (1, 2))
    assert_same(one, load(tmp_path / "out", device="cpu"), prompts, 1e-3)
    assert two["tokens"] == one["tokens"]


def tokenized(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer(text).input_ids for text in TEXTS]
