"""Plots as SVG for the report: text that takes the page's colours, so that it is right in light and dark."""

import math
from collections.abc import Callable, Sequence
from html import escape

WIDTH, HEIGHT = 720, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 14, 12, 40
SERIES = 8  # colours that the page has


def lines(series: dict[str, list[float | None]], x_label: str, y_label: str) -> str:
    """One line for each name over 0, 1, …; a logarithmic axis from the least positive value on. None: no point."""
    values = [v for ys in series.values() for v in ys if v is not None and v > 0]
    if not values:
        return ""
    to_y, ticks = _log_axis(min(values), max(values))
    length = max(len(ys) for ys in series.values())
    to_x = _linear(0, max(1, length - 1), _LEFT + 8, WIDTH - _RIGHT - 8)
    parts = [_axes([(to_y(v), f"{v:g}") for v in ticks], _whole_ticks(length - 1, to_x), x_label, y_label)]
    for i, (name, ys) in enumerate(series.items()):
        points = [(to_x(x), to_y(y), y, x) for x, y in enumerate(ys) if y is not None and y > 0]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
        parts.append(f'<polyline class="line s{i % SERIES}" points="{path}"/>')
        parts += [
            f'<circle class="dot s{i % SERIES}" cx="{x:.1f}" cy="{y:.1f}" r="2.5">'
            f"<title>{escape(name)}, block {at}: {value:.4g}</title></circle>"
            for x, y, value, at in points
        ]
    return _svg(parts, HEIGHT, f"{y_label} over {x_label}, one line each for {', '.join(series)}")


def heat(rows: dict[str, list[float | None]], x_label: str, unit: str) -> str:
    """A grid of cells, a row for each name, darker for more, and what the colours mean, from 1.5 to 4."""
    left, cell_h = 150, 22
    length = max((len(cells) for cells in rows.values()), default=0)
    if not length:
        return ""
    step = (WIDTH - left - _RIGHT) / length
    parts = []
    for r, (name, cells) in enumerate(rows.items()):
        y = _TOP + r * cell_h
        parts.append(f'<text class="label" x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        for c, value in enumerate(cells):
            if value is not None:
                parts.append(
                    f'<rect class="cell" x="{left + c * step:.1f}" y="{y}" width="{max(1.0, step - 1):.1f}" '
                    f'height="{cell_h - 2}" fill-opacity="{_opacity(value):.2f}">'
                    f"<title>{escape(name)}, block {c}: {value:.4g} {escape(unit)}</title></rect>"
                )
    bottom = _TOP + len(rows) * cell_h
    every = max(1, math.ceil(length / 12))
    for c in range(0, length, every):
        parts.append(f'<text class="tick" x="{left + (c + 0.5) * step:.1f}" y="{bottom + 14}">{c}</text>')
    parts.append(f'<text class="axis" x="{(left + WIDTH) / 2:.0f}" y="{bottom + 32}">{escape(x_label)}</text>')
    for i, value in enumerate((1.5, 2, 3, 4)):
        x, y = WIDTH - _RIGHT - 54 * (4 - i), bottom + 20
        parts.append(
            f'<rect class="cell key" x="{x}" y="{y}" width="16" height="14" fill-opacity="{_opacity(value)}"/>'
        )
        parts.append(f'<text x="{x + 20}" y="{y + 12}">{value:g}</text>')
    return _svg(parts, bottom + 40, f"{unit} of each layer, by kind and block")


def _opacity(bits: float) -> float:
    return round(0.12 + 0.88 * min(1.0, max(0.0, (bits - 1.25) / 2.75)), 2)


def scatter(points: Sequence[tuple[str, float, float]], x_label: str, y_label: str) -> str:
    """Named points (name, x, y); y logarithmic."""
    good = [(name, x, y) for name, x, y in points if x > 0 and y > 0]
    if not good:
        return ""
    to_y, ticks = _log_axis(min(y for *_, y in good), max(y for *_, y in good))
    low, high = min(x for _, x, _ in good), max(x for _, x, _ in good)
    pad = (high - low) * 0.12 or 0.1 * high
    to_x = _linear(low - pad, high + pad, _LEFT, WIDTH - _RIGHT)
    marks = [(to_x(v), f"{v:.4g}") for v in _nice(low - pad, high + pad)]
    parts = [_axes([(to_y(v), f"{v:g}") for v in ticks], marks, x_label, y_label)]
    for i, (name, x, y) in enumerate(good):
        cx, cy = to_x(x), to_y(y)
        right = cx > WIDTH * 0.65
        side = f'x="{cx - 9:.1f}" text-anchor="end"' if right else f'x="{cx + 9:.1f}" text-anchor="start"'
        title = f"<title>{escape(name)}: {x:.4g}, {y:.4g}</title>"
        parts.append(f'<circle class="dot s{i % SERIES}" cx="{cx:.1f}" cy="{cy:.1f}" r="6">{title}</circle>')
        parts.append(f'<text class="label" {side} y="{cy + 4:.1f}">{escape(name)}</text>')
    return _svg(parts, HEIGHT, f"{y_label} over {x_label} of {', '.join(name for name, *_ in good)}")


def _svg(parts: Sequence[str], height: float, title: str) -> str:
    head = f'<svg class="plot" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
    return head + "".join(parts) + "</svg>"


def _axes(ys: list[tuple[float, str]], xs: list[tuple[float, str]], x_label: str, y_label: str) -> str:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = [f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>' for y, _ in ys]
    parts += [f'<text class="tick end" x="{_LEFT - 6}" y="{y + 4:.1f}">{text}</text>' for y, text in ys]
    parts += [f'<text class="tick" x="{x:.1f}" y="{bottom + 16}">{text}</text>' for x, text in xs]
    middle = (_TOP + bottom) / 2
    parts.append(f'<text class="axis" x="{(_LEFT + right) / 2:.0f}" y="{HEIGHT - 6}">{escape(x_label)}</text>')
    turned = f'x="12" y="{middle:.0f}" transform="rotate(-90 12 {middle:.0f})"'
    parts.append(f'<text class="axis up" {turned}>{escape(y_label)}</text>')
    return "".join(parts)


def _linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda v: start + (v - low) / (high - low) * (end - start)


def _log_axis(low: float, high: float) -> tuple[Callable[[float], float], list[float]]:
    """Where values lie, and what to write at the axis: 1, 2, 5 of each decade, as far as they are inside."""
    low, high = low / 1.25, high * 1.25
    position = _linear(math.log(low), math.log(high), HEIGHT - _BOTTOM, _TOP)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    ticks = ticks if len(ticks) <= 7 else [t for t in ticks if str(f"{t:e}").startswith("1")]
    return (lambda v: position(math.log(v))), [float(f"{t:.3g}") for t in ticks] or [float(f"{high / 1.25:.3g}")]


def _nice(low: float, high: float) -> list[float]:
    """About five round values inside."""
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * next(m for m in (1, 2, 5, 10) if m * unit >= raw)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _whole_ticks(last: int, to_x: Callable[[float], float]) -> list[tuple[float, str]]:
    every = max(1, math.ceil((last + 1) / 12))
    return [(to_x(v), str(v)) for v in range(0, last + 1, every)]
