"""Small models of many architectures in real vLLM on the CPU: the tokens and log-probs of transformers."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from test_architectures import OTHERS, SETTINGS, written
from test_vllm import assert_same, vllm  # noqa: F401

import glq
from glq import pipeline
from glq.hf_integration import load

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm")

PROMPTS = [[0, 5 + i, 9, 30 + i, 200 - i] for i in range(2)]
TEXT_ALONE = {"language_model_only": True, "limit_mm_per_prompt": {"image": 0, "audio": 0, "video": 0}}


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, marks=[pytest.mark.slow] if a in OTHERS else []) for a in ARCHITECTURES if not a.vllm],
    ids=lambda a: a.name,
)
def test_vllm_is_transformers(architecture, vllm, tmp_path, monkeypatch):  # noqa: F811
    sees = architecture.model.endswith("ForConditionalGeneration")
    if sees and find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    tokens = torch.randint(2, 302, (4, 32))
    monkeypatch.setattr(pipeline, "_calibration_windows", lambda *_: tokens)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "stand_ins"), prepend=os.pathsep)
    glq.quantize(written(architecture, tmp_path / "model"), tmp_path / "out", SETTINGS, device="cpu")
    options = {"skip_tokenizer_init": True, "max_model_len": 64} | (TEXT_ALONE if sees else {})
    options |= {"dtype": "bfloat16"} if architecture.bf16 else {}
    answer = vllm(tmp_path / "out", PROMPTS, tokens=6, **options)
    assert_same(answer, load(tmp_path / "out", device="cpu"), PROMPTS, 0.06 if architecture.bf16 else 1e-3)
