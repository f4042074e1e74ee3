"""The wheel alone, outside the source tree: imports, quantizes, loads."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

CODE = """
import sys
import glq, glq.hf_integration
assert glq.__file__.startswith(sys.argv[1]), glq.__file__
from transformers import AutoModelForCausalLM
glq.quantize(sys.argv[2], "out", glq.Settings(bits=2, tokens=256, ctx=64), device="cpu")
AutoModelForCausalLM.from_pretrained("out").generate(max_new_tokens=3)
print(glq.inspect("out").bits)
"""


def test_wheel(tiny_model, tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "dist", ROOT]
    subprocess.run(build, check=True)
    (wheel,) = (tmp_path / "dist").glob("glq-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    assert not list(site.rglob("tests"))
    environment = os.environ | {"PYTHONPATH": str(site)}
    run = subprocess.run(
        [sys.executable, "-c", CODE, str(site), str(tiny_model)],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert 2 < float(run.stdout.split()[-1]) < 4
