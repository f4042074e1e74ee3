"""`glq doctor`."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from glq.commands.console import out, plain_errors, say
from glq.errors import how_to_install

if TYPE_CHECKING:
    from glq.selftest import Outcome


def doctor(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """What this machine has, which kernels it gets and why, and whether they are right and fast here."""
    with plain_errors():
        from glq import doctor as facts
        from glq import selftest
        from glq.machine import pick_device

        where = pick_device(device)
        found, chosen = facts.devices(), facts.choices(where)
        if not as_json:
            loaded = facts.busy()  # before the tests are work of our own
            _describe(facts.system(), [asdict(p) for p in facts.packages()], [asdict(d) for d in found])
            for choice in chosen:
                say(f"{choice.codecs}: {choice.family} ({choice.why})")
        outcomes = [selftest.run(kernel, where) for kernel in selftest.kernels(where)]
        if as_json:
            content = {
                "system": facts.system(),
                "packages": [asdict(p) for p in facts.packages()],
                "devices": [asdict(d) for d in found],
                "kernels": [asdict(c) for c in chosen],
                "selftest": [_row(o) for o in outcomes],
            }
            sys.stdout.write(json.dumps(content, indent=2) + "\n")
        else:
            _show(outcomes)
            bad = sum(not o.good for o in outcomes)
            many = "the kernel" if len(outcomes) == 1 else f"all {len(outcomes)} kernels"
            good = f"{many} gave right results" if outcomes else "there are no kernels to try here"
            say(f"{bad} of {len(outcomes)} kernels failed" if bad else f"{good}: glq works on this machine")
            if loaded is not None:
                say(loaded)
            if outcomes:
                say("error: distance from the fp32 result, relative; below 0.0156, two roundings to bf16, is right")
        if wrong := [o for o in outcomes if not o.good]:
            taken = {choice.family for choice in chosen}
            if any(o.kernel.family in taken for o in wrong):
                raise typer.Exit(1)


def _describe(system: dict[str, str], packages: list[dict[str, str]], devices: list[dict[str, str]]) -> None:
    table = Table("", "here", "glq was tested with")
    for name, value in system.items():
        table.add_row(name, value, "")
    for p in packages:
        missing = "not installed" + (f": \\[{p['extra']}] brings it" if p["extra"] else "")
        table.add_row(p["name"], p["found"] or missing, p["tested"])
    out.print(table)
    say(f"what is missing: {how_to_install('EXTRA')}")
    for d in devices:
        say(f"{d['name']}, {d['arch']}, {int(d['memory']) / 1e9:.1f} GB, {d['multiprocessors']} multiprocessors")
        say(f"  glq's kernels on {d['arch']}: {d['evidence']} (docs/hardware.md)")


def _show(outcomes: "list[Outcome]") -> None:
    table = Table("kernel", "codec", "tokens", "µs", "bf16 µs", "× bf16", "error")
    for o in outcomes:
        row = _row(o)
        name = f"{o.kernel.family}: {o.kernel.name}"
        if o.failure is not None:
            table.add_row(name, o.kernel.codec, str(o.kernel.tokens), "[red]failed[/red]", "", "", "")
        else:
            figures = (f"{row['us']:.1f}", f"{row['bf16_us']:.1f}", f"{row['speedup']:.2f}", f"{row['error']:.4f}")
            table.add_row(name, o.kernel.codec, str(o.kernel.tokens), *figures)
    out.print(table)
    for o in outcomes:
        if o.failure is not None:
            say(f"{o.kernel.family}: {o.kernel.name} {o.failure}")


def _row(o: "Outcome") -> dict[str, object]:
    row: dict[str, object] = {k: v for k, v in vars(o.kernel).items() if k != "multiply"}
    speedup = o.bf16_us / o.us if o.us and o.bf16_us else None
    return row | {"error": o.error, "us": o.us, "bf16_us": o.bf16_us, "speedup": speedup, "failure": o.failure}
