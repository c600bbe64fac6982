"""A line chart as a piece of HTML: lines in inline SVG that stretches, labels as text that does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal

MOST_POINTS = 1000  # more cannot be seen apart, and only make the file heavy
WIDTH, HEIGHT = 1000.0, 300.0  # of the SVG's own coordinates; it is stretched to its box


@dataclass(frozen=True, slots=True)
class Line:
    """A named line through (step, value) points; `style` chooses its colour and weight."""

    name: str
    points: Sequence[tuple[float, float]]
    style: Literal["faint", "first", "second"] = "first"


def moving_average(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Each value replaced by the mean of `window` values around it, fewer at the ends; only finite ones."""
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    averaged = []
    for place, (step, _) in enumerate(finite):
        # As many on each side, so that a falling curve is not drawn too high by its past.
        reach = min(window // 2, place, len(finite) - 1 - place)
        around = finite[place - reach : place + reach + 1]
        averaged.append((step, sum(value for _, value in around) / len(around)))
    return averaged


def line_chart(
    lines: Sequence[Line], *, x_name: str, y_name: str, from_zero: bool = True, small: bool = False
) -> str:
    """Lines -> HTML of a chart with axes, grid and legend; '' if no line has a finite point.

    Long lines are drawn as means of neighbouring points, and values that are NaN or infinite not at all; the
    caption says both.
    """
    notes = []
    drawn: list[tuple[Line, list[tuple[float, float]]]] = []
    for line in lines:
        finite = [(step, value) for step, value in line.points if math.isfinite(value)]
        if len(finite) < len(line.points):
            notes.append(f"{line.name}: {len(line.points) - len(finite)} values are not finite and not drawn")
        bin_points = math.ceil(len(finite) / MOST_POINTS)
        if bin_points > 1:
            notes.append(f"{line.name}: each drawn point is the mean of {bin_points} values")
            finite = _binned(finite, bin_points)
        if finite:
            drawn.append((line, finite))
    if not drawn:
        return ""
    steps = [step for _, points in drawn for step, _ in points]
    values = [value for _, points in drawn for _, value in points]
    x_low, x_high = min(steps), max(steps)
    if x_high == x_low:
        x_high = x_low + 1
    y_ticks = ticks(min(0.0, *values) if from_zero else min(values), max(values), 4)
    x_ticks = [tick for tick in ticks(x_low, x_high, 6) if x_low <= tick <= x_high]
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(step: float, value: float) -> tuple[float, float]:
        x = (step - x_low) / (x_high - x_low) * WIDTH
        return x, (1 - (value - y_low) / (y_high - y_low)) * HEIGHT

    svg = []
    for tick in y_ticks:
        y = place(x_low, tick)[1]
        svg.append(f'<path class="grid" d="M0 {y:.1f}H{WIDTH:.0f}"/>')
    for line, points in drawn:
        corners = [place(step, value) for step, value in points]
        if len(corners) == 1:
            corners = [(corners[0][0] - 4, corners[0][1]), (corners[0][0] + 4, corners[0][1])]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in corners)
        svg.append(f'<path class="line {line.style}" d="M{path}"/>')
    y_labels = "".join(
        f'<span style="top:{100 * place(x_low, tick)[1] / HEIGHT:.2f}%">{tick_text(tick, y_ticks)}</span>'
        for tick in y_ticks
    )
    x_labels = "".join(
        f'<span style="left:{100 * place(tick, y_low)[0] / WIDTH:.2f}%">{tick_text(tick, x_ticks)}</span>'
        for tick in x_ticks
    )
    legend = "".join(f'<li><i class="{line.style}"></i>{escape(line.name)}</li>' for line, _ in drawn if line.name)
    caption = f"<figcaption>{escape('; '.join(notes))}</figcaption>" if notes else ""
    summary = f"{y_name} by {x_name}: " + "; ".join(
        f"{line.name} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for line, points in drawn
    )
    return (
        f'<figure class="chart{" small" if small else ""}">'
        f'<ul class="legend"><li class="axis">{escape(y_name)}</li>{legend}</ul>'
        f'<div class="frame"><div class="y">{y_labels}</div>'
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(summary)}">{"".join(svg)}</svg>'
        f'<div class="x">{x_labels}</div></div>'
        f'<div class="axis x-name">{escape(x_name)}</div>{caption}</figure>'
    )


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart), some `about` of them, covering low .. high."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * number for number in range(first, last + 1)]


def tick_text(value: float, among: Sequence[float]) -> str:
    """The number as short as the distance between the ticks allows: '0.25', '1500', '2e-4'."""
    if value == 0:
        return "0"
    largest = max(abs(tick) for tick in among)
    if largest < 1e-2 or largest >= 1e6:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    step = min((abs(b - a) for a, b in pairwise(among)), default=largest)
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _binned(points: Sequence[tuple[float, float]], size: int) -> list[tuple[float, float]]:
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(s for s, _ in group) / len(group), sum(v for _, v in group) / len(group)) for group in groups]
