"""Small models of many architectures in real vLLM on the CPU: the tokens and log-probs of transformers."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from test_architectures import SETTINGS, written
from test_vllm import assert_same, vllm  # noqa: F401

import glq
from glq import pipeline
from glq.hf_integration import load

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm")

QUICK = ("Gemma 4 (E4B's kind)", "Phi-3, Phi-4")  # half a minute each
PROMPTS = [[0, 5 + i, 9, 30 + i, 200 - i] for i in range(2)]
TORCHVISION = Path(sys.prefix, "torchvision")  # by itself: beside a torch for CPUs PyPI's breaks transformers
TEXT_ALONE = {"language_model_only": True, "limit_mm_per_prompt": {"image": 0, "audio": 0, "video": 0}}


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, marks=[] if a.name in QUICK else [pytest.mark.slow]) for a in ARCHITECTURES if not a.vllm],
    ids=lambda a: a.name,
)
def test_vllm_is_transformers(architecture, vllm, tmp_path, monkeypatch):  # noqa: F811
    sees = architecture.model.endswith("ForConditionalGeneration")
    if sees and not TORCHVISION.exists():
        pytest.skip("needs torchvision")
    tokens = torch.randint(2, 302, (4, 32))
    monkeypatch.setattr(pipeline, "_calibration_windows", lambda *_: tokens)
    if sees:
        places = os.pathsep.join([str(Path(__file__).parent / "stand_ins"), str(TORCHVISION)])
        monkeypatch.setenv("PYTHONPATH", places, prepend=os.pathsep)
    glq.quantize(written(architecture, tmp_path / "model"), tmp_path / "out", SETTINGS, device="cpu")
    options = {"skip_tokenizer_init": True, "max_model_len": 64} | (TEXT_ALONE if sees else {})
    options |= {"dtype": "bfloat16"} if architecture.bf16 else {}
    answer = vllm(tmp_path / "out", PROMPTS, tokens=6, **options)
    assert_same(answer, load(tmp_path / "out", device="cpu"), PROMPTS, 0.06 if architecture.bf16 else 1e-3)
