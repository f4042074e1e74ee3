"""Pictures, by matplotlib, which [eval] brings."""

from pathlib import Path

from glq.allocation import Plan
from glq.codecs import get_codec
from glq.errors import GlqError, how_to_install


def plot_plan(plan: Plan, file: Path) -> None:
    """Bits of every group over the depth of the model, one line for each kind of group."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise GlqError(f"plots need matplotlib: {how_to_install('eval')}") from error
    kinds: dict[str, list[float]] = {}
    for group, codec in zip(plan.groups, plan.codecs, strict=True):
        kind = " / ".join(name.rsplit(".", 1)[-1] for name in group.layers)
        kinds.setdefault(kind, []).append(get_codec(codec).bits)
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for kind, bits in kinds.items():
        axes.step(range(len(bits)), bits, where="mid", label=kind)
    axes.set(xlabel="block", ylabel="bits a weight", title=f"{plan.bits:g} bits a weight")
    axes.legend(fontsize="small")
    figure.savefig(file)
