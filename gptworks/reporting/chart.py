"""Line charts as inline SVG. Positions are percentages, text and strokes keep their size, so a chart fits any width."""

import html
import math
from collections.abc import Callable
from dataclasses import dataclass

from gptworks.core.log import count

Point = tuple[float, float]
MOST_POINTS = 2000  # more are thinned to the lowest and highest of each bucket


@dataclass(frozen=True)
class Series:
    """One line: its name in the legend, its CSS class, (step, value) in order of steps, and whether points get dots."""

    name: str
    style: str
    points: list[Point]
    dots: bool = False


def chart(
    title: str,
    series: list[Series],
    last_step: float = 0.0,
    from_zero: bool = False,
    across_label: Callable[[float], str] | None = None,
) -> str:
    """A figure with axes, ticks and, for two lines or more, a legend; "" if there is nothing to draw.

    The value axis is linear; it is logarithmic where positive values span a factor of 50 and it need not start at zero.
    """
    series = [Series(one.name, one.style, points=thin(one.points), dots=one.dots) for one in series if one.points]
    if not series:
        return ""
    values = [y for one in series for _, y in one.points]
    low, high = min(values), max(values)
    log = not from_zero and low > 0 and high / low > 50
    marks = decades(low, high) if log else ticks(min(low, 0.0) if from_zero else low, high)
    right = max([last_step, 1.0, *(x for one in series for x, _ in one.points)])

    def across(x: float) -> float:
        return round(100 * x / right, 3)

    def down(y: float) -> float:
        bottom, top, y = (math.log10(v) if log else v for v in (marks[0], marks[-1], y))
        return round(100 - 100 * (y - bottom) / (top - bottom), 3)

    drawn = []
    for y in marks:
        drawn.append(f'<line class="grid" x1="0" x2="100%" y1="{down(y)}%" y2="{down(y)}%"/>')
        drawn.append(f'<text class="y" x="-8" y="{down(y)}%" dy="4">{label(y)}</text>')
    for x in (x for x in ticks(0.0, right) if x <= right):
        drawn.append(f'<line class="tick" x1="{across(x)}%" x2="{across(x)}%" y1="100%" y2="100%"/>')
        drawn.append(f'<text class="x" x="{across(x)}%" y="100%" dy="18">{(across_label or label)(x)}</text>')
    for one in series:
        path = " ".join(f"{across(x)},{down(y)}" for x, y in one.points)
        line = f'<polyline class="{one.style}" points="{path}" vector-effect="non-scaling-stroke"/>'
        drawn.append(f'<svg viewBox="0 0 100 100" preserveAspectRatio="none">{line}</svg>')
        for x, y in one.points if one.dots or len(one.points) == 1 else []:
            hint = html.escape(f"{one.name} {y:.4g} at step {x:,.0f}")
            drawn.append(
                f'<circle class="{one.style}" cx="{across(x)}%" cy="{down(y)}%" r="3.5"><title>{hint}</title></circle>'
            )
    names = "".join(f'<span class="key {one.style}">{html.escape(one.name)}</span>' for one in series)
    heading = f"<b>{html.escape(title)}</b>{names if len(series) > 1 else ''}{' (logarithmic)' if log else ''}"
    spoken = "; ".join(f"{one.name} from {one.points[0][1]:.4g} to {one.points[-1][1]:.4g}" for one in series)
    return (
        f'<figure><figcaption>{heading}</figcaption><svg class="plot" role="img" '
        f'aria-label="{html.escape(spoken)}">{"".join(drawn)}</svg></figure>'
    )


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
