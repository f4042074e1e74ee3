"""Draw the pictures of docs/how-it-works.md: E8, what a rotation does to weights, rate and distortion of the codecs.

Usage: python tools/pictures.py [FOLDER]
"""

import itertools
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from glq.codecs import CODECS
from glq.codecs.trellis import Trellis
from glq.rotation import block_width, random_signs, rotate

FOLDER = Path(__file__).parent.parent / "docs" / "pictures"
BLUE, ORANGE, GREEN, GREY = "#2f5fb3", "#c2571a", "#2a8a57", "#8a909a"


def roots() -> np.ndarray:
    """The 240 shortest vectors of E8 [240, 8]."""
    pairs = [
        [s if k == i else t if k == j else 0 for k in range(8)]
        for i, j in itertools.combinations(range(8), 2)
        for s in (1, -1)
        for t in (1, -1)
    ]
    halves = [[s / 2 for s in signs] for signs in itertools.product((1, -1), repeat=8) if np.prod(signs) > 0]
    return np.array(pairs + halves)


def coxeter_plane(vectors: np.ndarray) -> np.ndarray:
    """[n, 8] → [n, 2]: the plane in which a Coxeter element turns by 1/30 of a circle."""
    simple = np.zeros((8, 8))
    for i in range(6):
        simple[i, i], simple[i, i + 1] = 1, -1
    simple[6, 5], simple[6, 6] = 1, 1
    simple[7] = -0.5
    element = np.eye(8)
    for root in simple:
        element = element @ (np.eye(8) - 2 * np.outer(root, root) / (root @ root))
    values, eigenvectors = np.linalg.eig(element)
    found = eigenvectors[:, np.argmin(np.abs(values - np.exp(2j * np.pi / 30)))]
    first, second = found.real / np.linalg.norm(found.real), found.imag
    second = second - (second @ first) * first
    return vectors @ np.stack([first, second / np.linalg.norm(second)], 1)


def draw_e8(file: Path) -> None:
    found = roots()
    points = coxeter_plane(found)
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    for i, j in itertools.combinations(range(240), 2):
        if abs(found[i] @ found[j] - 1) < 1e-9:
            axes.plot(*zip(points[i], points[j], strict=True), color=BLUE, linewidth=0.12, alpha=0.5)
    axes.plot(points[:, 0], points[:, 1], ".", color=ORANGE, markersize=5)
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_title("The 240 nearest neighbours of a point of E8")
    save(figure, file.with_suffix(".png"))  # thousands of lines


def draw_rotation(file: Path) -> None:
    """A matrix with a few large columns, as attention's often are, before and after signs and Hadamard."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(256, 1024, generator=generator)
    w[:, ::97] *= 12
    turned = rotate(w, random_signs(1024, generator), block_width(1024))
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, values, title in zip(
        figure.subplots(1, 2, sharey=True), (w, turned), ("weights", "rotated weights"), strict=True
    ):
        unit = (values / values.std()).flatten().numpy()
        axes.hist(unit, bins=60, range=(-8, 8), density=True, color=BLUE, log=True, histtype="stepfilled")
        x = np.linspace(-8, 8, 200)
        axes.plot(x, np.exp(-x * x / 2) / np.sqrt(2 * np.pi), color=ORANGE, label="Gaussian")
        axes.set(title=f"{title}, largest {abs(unit).max():.1f} σ", ylim=(1e-6, 5), xlabel="σ")
        axes.legend()
    save(figure, file)


def draw_rates(file: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    rate = np.linspace(1.4, 4.1, 50)
    axes.plot(rate, 6.0206 * rate, color=GREY, label="no code can do better: 2^(−2R)")
    families = {"trellis codes": BLUE, "E8": GREEN}
    for family, color in families.items():
        found = [c for c in CODECS.values() if isinstance(c, Trellis) == (family == "trellis codes")]
        found.sort(key=lambda c: c.bits)
        decibels = [-10 * np.log10(c.mse) for c in found]
        axes.plot([c.bits for c in found], decibels, "o", color=color, label=family)
    scalar = {1.585: 0.1902, 2: 0.1175, 3: 0.03454, 4: 0.009497}  # Max, 1960: the best levels for a Gaussian
    levels = [-10 * np.log10(v) for v in scalar.values()]
    axes.plot(scalar.keys(), levels, "s", color=ORANGE, label="best single levels")
    axes.set(xlabel="bits a weight", ylabel="dB, Gaussian weights")
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, file)


def save(figure: Figure, file: Path) -> None:
    metadata = {"Date": None} if file.suffix == ".svg" else {"Software": None}
    figure.savefig(file, metadata=metadata, dpi=80)


def main(folder: Path) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "glq"
    folder.mkdir(parents=True, exist_ok=True)
    draw_e8(folder / "e8.png")
    draw_rotation(folder / "rotation.svg")
    draw_rates(folder / "rates.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
