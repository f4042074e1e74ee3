"""Real vLLM on the CPU, each engine in a process of its own: the tokens and log-probs of transformers."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import make_model

import glq
from glq.hf_integration import load

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm")

JOB = Path(__file__).with_name("vllm_job.py")


def environment() -> dict[str, str]:
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
            "OMP_NUM_THREADS": "2",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    )


@pytest.fixture
def vllm(tmp_path):
    """Runs a job of vllm_job.py: its answer, or its output if it failed."""

    def run(model, prompts=((0, 5, 9),), tokens=8, packed=False, **llm):
        llm = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8} | llm
        job = {"model": str(model), "llm": llm, "prompts": prompts, "tokens": tokens, "packed": packed}
        (tmp_path / "job.json").write_text(json.dumps(job))
        command = [sys.executable, JOB, tmp_path / "job.json"]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
        if done.returncode:
            return done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

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


def add_biases(model):
    """Those of a new model are zeros, which would hide that they are not read."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    for name in tensors:
        if name.endswith(".bias"):
            tensors[name] = torch.randn_like(tensors[name])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


PROMPTS = [[0, 5 + i, 9, 30 + i, 200 - i] for i in range(4)]


@pytest.mark.parametrize(
    "options", [{}, {"packed": True}, {"packed": True, "enforce_eager": False}], ids=["decoded", "packed", "compiled"]
)
def test_a_tiny_model_is_transformers(options, checkpoint, vllm):
    assert_same(vllm(checkpoint, PROMPTS, **options), load(checkpoint, device="cpu"), PROMPTS, 1e-4)
