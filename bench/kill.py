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

from glq.unfinished import folder_of


def command(model: Path, out: Path, options: list[str]) -> list[str]:
    return [sys.executable, "-m", "glq", "quantize", str(model), str(out), *options]


def digests(folder: Path) -> dict[str, str]:
    """Of all files but the reports, which say how long a run took."""
    files = [file for file in sorted(folder.iterdir()) if not file.name.startswith("report.")]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run(line: list[str], out: Path, after: float) -> float | None:
    """Run, and kill so many seconds after work began; how long it took from there, None if it was killed."""
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begun: float | None = None
    lock = folder_of(out) / "lock"
    while process.poll() is None:
        if begun is None and lock.exists() and lock.read_text().strip() == str(process.pid):
            begun = time.monotonic()
        if begun is not None and time.monotonic() - begun > after:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return None
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"a run that was not killed ended with {process.returncode}: {' '.join(line)}")
    return time.monotonic() - (begun or time.monotonic())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    settings, options = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    whole, out = (settings.work / name / "out" for name in ("whole", "killed"))  # the model card has its name
    for folder in (whole.parent, out.parent):
        folder.mkdir(parents=True, exist_ok=True)
    seconds = run(command(settings.model, whole, options), whole, 1e9) or 0.0
    expected = digests(whole)
    print(f"one run works for {seconds:.1f} s and writes {len(expected)} files")
    pick, kills, through, wrong = random.Random(settings.seed), 0, 0, 0
    while kills < settings.kills or folder_of(out).exists():
        after = pick.uniform(0, 1.02 * seconds) if kills < settings.kills else 1e9
        if run(command(settings.model, out, options), out, after) is None and not out.exists():
            kills += 1
            continue
        through += 1
        differ = [name for name, digest in digests(out).items() if expected.get(name) != digest]
        wrong += bool(differ) or digests(out).keys() != expected.keys()
        verdict = f"differs in {', '.join(differ)}" if differ else "is the same"
        print(f"after {kills} kills: checkpoint {through} {verdict}", flush=True)
        shutil.rmtree(out)
        shutil.rmtree(folder_of(out), ignore_errors=True)  # of a run killed when all was in its place
    print(f"{kills} kills, {through} checkpoints, {wrong} of them wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
