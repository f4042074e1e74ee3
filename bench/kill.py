"""Whether a quantization that is killed again and again writes the bytes of one that is not.

    python bench/kill.py MODEL WORK [--kills 25] [-- OPTIONS OF glq quantize]

Runs `glq quantize` once from start to end, then again, with a SIGKILL at a random instant, until it is through, and so
on until the kills are used up; the instants lie all over the work, its last moments included. Compares every file of
every checkpoint. Exit status 1 if one differs.
"""

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


def command(model: Path, out: Path, options: list[str]) -> list[str]:
    return [sys.executable, "-m", "glq", "quantize", str(model), str(out), *options]


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def timed(line: list[str], out: Path) -> tuple[float, float]:
    """Seconds until work begins, and until it ends."""
    begun, start = time.monotonic(), 0.0
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        if not start and (out.parent / f".{out.name}.partial").exists():
            start = time.monotonic() - begun
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit("a run that was not killed failed")
    return start, time.monotonic() - begun


def killed(line: list[str], out: Path, after: float) -> bool:
    """Run, and kill after so many seconds; whether it was still running."""
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    finally:
        assert process.stderr is not None
        said = process.stderr.read().decode()
    if process.returncode and not out.exists():
        raise SystemExit(f"a run that was not killed failed:\n{said}")
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    settings, options = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    settings.work.mkdir(parents=True, exist_ok=True)
    whole, out = settings.work / "whole", settings.work / "out"
    start, seconds = timed(command(settings.model, whole, options), whole)
    expected = digests(whole)
    print(f"one run takes {seconds:.1f} s, of which {start:.1f} before any work, and writes {len(expected)} files")
    pick, kills, through, wrong, spent = random.Random(settings.seed), 0, 0, 0, 0.0
    while kills < settings.kills or out.exists() or spent:
        after = pick.uniform(0.9 * start, 1.02 * seconds) if kills < settings.kills else 1e9
        begun = time.monotonic()
        if killed(command(settings.model, out, options), out, after):
            kills += 1
            spent += time.monotonic() - begun
            continue
        through += 1
        differ = [name for name, digest in digests(out).items() if expected.get(name) != digest]
        wrong += bool(differ) or digests(out).keys() != expected.keys()
        left = [file.name for file in settings.work.glob(".out*")]
        verdict = f"differs in {', '.join(differ)}" if differ else "is the same"
        print(f"after {kills} kills: checkpoint {through} {verdict}")
        if left:
            wrong += 1
            print(f"left behind: {', '.join(left)}")
        shutil.rmtree(out)
        spent = 0.0
    print(f"{kills} kills, {through} checkpoints, {wrong} of them wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
