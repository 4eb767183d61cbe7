"""Line charts as inline SVG. Positions are percentages, text and strokes keep their size, so a chart fits any width."""

import html
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

from gptworks.core.log import count
from gptworks.reporting.markup import clean, h

Point = tuple[float, float]
MOST_POINTS = 500  # more are thinned to the lowest and highest of each bucket
CLOSE = 7.0  # per cent of the height, at which the names of two levels would lie on each other


@dataclass(frozen=True)
class Series:
    """One line: its name in the legend, its CSS class, (step, value) in order of steps, and whether points get dots."""

    name: str
    style: str
    points: list[Point]
    dots: bool = False


@dataclass(frozen=True)
class Axes:
    """The things that stand around a chart besides its steps and values."""

    unit: str = ""  # of the values
    other_unit: str = ""  # of the right side, if it has one
    factor: float | None = None  # from a value to that of the right side
    below: tuple[tuple[str, Callable[[float], str]], ...] = ()  # named rows of labels under the steps


def chart(
    title: str,
    series: list[Series],
    last_step: float = 0.0,
    from_zero: bool = False,
    across_label: Callable[[float], str] | None = None,
    *,
    levels: list[tuple[str, float]] | None = None,
    axes: Axes | None = None,
) -> str:
    """A figure with axes, ticks and, for two lines or more, a legend; "" if there is nothing to draw. `levels` are
    named values to compare with.

    The value axis is linear; it is logarithmic where positive values span a factor of 50 and it need not start at zero.
    What a pointer over it shows lies beside it, for the script of the page.
    """
    series = [Series(one.name, one.style, points=thin(one.points), dots=one.dots) for one in series if one.points]
    if not series:
        return ""
    axes, levels = axes or Axes(), levels or []
    values = [y for one in series for _, y in one.points] + [y for _, y in levels]
    low, high = min(values), max(values)
    log = not from_zero and low > 0 and high / low > 50
    marks = decades(low, high) if log else ticks(min(low, 0.0) if from_zero else low, high)
    right = max([last_step, 1.0, *(x for one in series for x, _ in one.points)])

    def across(x: float) -> float:
        return round(100 * x / right, 2)

    def down(y: float) -> float:
        bottom, top, y = (math.log10(v) if log else v for v in (marks[0], marks[-1], y))
        return round(100 - 100 * (y - bottom) / (top - bottom), 2)

    drawn = []
    for y in marks:
        drawn.append(f'<line class="grid" x1="0" x2="100%" y1="{down(y)}%" y2="{down(y)}%"/>')
        drawn.append(f'<text class="y" x="-8" y="{down(y)}%" dy="4">{label(y)}</text>')
        if axes.factor:
            shown = f"{y * axes.factor:.2f}"
            drawn.append(f'<text class="r" x="100%" dx="8" y="{down(y)}%" dy="4">{shown}</text>')
    for name, side in ((axes.unit, 'class="u" x="-44"'), (axes.other_unit, 'class="r u" x="100%" dx="44"')):
        drawn.append(f'<text {side} y="0" dy="-16">{h(name)}</text>' if name else "")
    steps = [x for x in ticks(0.0, right) if x <= right]
    for x in steps:
        drawn.append(f'<line class="tick" x1="{across(x)}%" x2="{across(x)}%" y1="100%" y2="100%"/>')
    for row, (name, text_of) in enumerate((("step" if axes.below else "", across_label or label), *axes.below)):
        drawn.append(f'<text class="y" x="-20" y="100%" dy="{18 + 16 * row}">{h(name)}</text>' if row else "")
        for x in steps:
            told = h(text_of(x))
            drawn.append(f'<text class="x" x="{across(x)}%" y="100%" dy="{18 + 16 * row}">{told}</text>')
    places = sorted((down(y), name, y) for name, y in levels)
    for number, (place, name, y) in enumerate(places):
        crowded = any(abs(place - other) < CLOSE for other, _, _ in places[:number])
        drawn.append(f'<line class="level" x1="0" x2="100%" y1="{place}%" y2="{place}%"/>')
        said = f"{name} {y:.4g} {axes.unit}" if not axes.factor else f"{name} {y * axes.factor:.3f} {axes.other_unit}"
        drawn.append(f'<text class="level" x="100%" dx="-4" y="{place}%" dy="{14 if crowded else -5}">{h(said)}</text>')
    for one in series:
        path = " ".join(f"{across(x)},{down(y)}" for x, y in one.points)
        line = f'<polyline class="{one.style}" points="{path}" vector-effect="non-scaling-stroke"/>'
        drawn.append(f'<svg viewBox="0 0 100 100" preserveAspectRatio="none">{line}</svg>')
        for x, y in one.points if one.dots or len(one.points) == 1 else []:
            hint = h(f"{one.name} {y:.4g} at step {x:,.0f}")
            drawn.append(
                f'<circle class="{one.style}" cx="{across(x)}%" cy="{down(y)}%" r="3.5"><title>{hint}</title></circle>'
            )
    names = "".join(f'<span class="key {one.style}">{h(one.name)}</span>' for one in series)
    heading = f"<b>{h(title)}</b>{names if len(series) > 1 else ''}{' (logarithmic)' if log else ''}"
    spoken = "; ".join(f"{one.name} from {one.points[0][1]:.4g} to {one.points[-1][1]:.4g}" for one in series)
    hover = _hover(series, axes, across=across, down=down, across_label=across_label)
    rows = f" rows{len(axes.below)}" if axes.below else ""
    rows += " two-sided" if axes.factor else ""
    return (
        f"<figure data-hover='{hover}'>"
        f'<figcaption>{heading}</figcaption><div class="frame">'
        f'<svg class="plot{rows}" role="img" aria-label="{h(f"{title}: {spoken}")}">{"".join(drawn)}</svg>'
        "</div></figure>"
    )


def _hover(
    series: list[Series], axes: Axes, *, across: Callable[[float], float], down: Callable[[float], float],
    across_label: Callable[[float], str] | None,
) -> str:  # fmt: skip
    """Gives what a pointer shows, as JSON: a line of text at each place, each series' points with their values."""

    def head(x: float) -> str:
        first = across_label(x) if across_label else f"step {x:,.0f}"
        return " · ".join([first, *(text_of(x) + (name != "time") * f" {name}" for name, text_of in axes.below)])

    def told(y: float) -> str:
        more = f" · {y * axes.factor:.3f} {axes.other_unit}" if axes.factor else ""
        return f"{y:.4g}{' ' + axes.unit if more else ''}{more}"

    lines = [
        {"name": one.name, "style": one.style, "points": [[across(x), down(y), told(y)] for x, y in one.points]}
        for one in series
    ]
    heads = [[across(x), head(x)] for x in sorted({x for one in series for x, _ in one.points})]
    text = json.dumps({"heads": heads, "lines": lines}, ensure_ascii=False, separators=(",", ":"))
    return html.escape(clean(text), quote=False).replace("'", "&#x27;")  # for an attribute in single quotes


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values, evenly spaced, that enclose [low, high]; at least two."""
    span = high - low if high > low else abs(high) / 2 or 1.0
    size = 10.0 ** math.floor(math.log10(span / about))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if span / (size * factor) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, max(last, first + 1) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten that enclose [low, high], nine at most."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = math.ceil((last - first) / 8)
    return [10.0**power for power in range(first, last + stride, stride)]


def label(value: float) -> str:
    return count(value) if value >= 10_000 else f"{value:,g}"


def thin(points: list[Point]) -> list[Point]:
    """At most MOST_POINTS points that keep every peak visible."""
    size = math.ceil(2 * len(points) / MOST_POINTS)
    if len(points) <= MOST_POINTS:
        return points
    kept: list[Point] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        kept += sorted({min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])})
    return kept
