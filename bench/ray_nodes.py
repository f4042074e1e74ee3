"""Whether a quantization on a Ray cluster writes the bytes of one process, though workers are killed.

    python bench/ray_nodes.py MODEL WORK [--nodes 2] [--kills 5] [-- OPTIONS OF glq quantize]

Starts nodes on this machine, a processor each. Runs `glq quantize` with one thread, then with `--ray` on the nodes;
meanwhile SIGKILLs a worker that rounds at random instants. Compares every file. Exit status 1 if one differs.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from kill import command, digests

ROOT = str(Path(__file__).parents[1])


def rounding() -> list[int]:
    """The processes of this machine in which a worker of Ray rounds a matrix."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::_round"):
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return found


def run(line: list[str], kills: int, pick: random.Random) -> tuple[float, int]:
    """Seconds, and how many workers were killed."""
    begun, done, after = time.monotonic(), 0, 0.0
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None:
        if done < kills and time.monotonic() > after and (busy := rounding()):
            time.sleep(pick.uniform(0, 0.5))
            if set(busy) & set(rounding()):
                os.kill(pick.choice(sorted(set(busy) & set(rounding()))), signal.SIGKILL)
                done, after = done + 1, time.monotonic() + pick.uniform(1, 10)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"ended with {process.returncode}: {' '.join(line)}")
    return time.monotonic() - begun, done


def main() -> None:
    from ray.cluster_utils import Cluster

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    settings, options = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    os.environ |= {"PYTHONPATH": ROOT, "RAY_USAGE_STATS_ENABLED": "0"}
    whole, out = (settings.work / name / "out" for name in ("whole", "ray"))  # the model card has its name
    for folder in (whole.parent, out.parent):
        folder.mkdir(parents=True, exist_ok=True)
    pick = random.Random(settings.seed)
    seconds, _ = run(command(settings.model, whole, options), 0, pick)
    print(f"one process: {seconds:.0f} s", flush=True)
    node = {"num_cpus": 1, "object_store_memory": 200 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    for _ in range(settings.nodes - 1):
        cluster.add_node(**node)
    seconds, kills = run(command(settings.model, out, [*options, "--ray", cluster.address]), settings.kills, pick)
    cluster.shutdown()
    expected, found = digests(whole), digests(out)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    verdict = f"differs in {', '.join(wrong)}" if wrong else "the same"
    print(f"{settings.nodes} nodes, {kills} workers killed: {seconds:.0f} s, {len(found)} files, {verdict}")
    sys.exit(bool(wrong) or kills < settings.kills)


if __name__ == "__main__":
    main()
