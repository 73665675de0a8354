"""Line charts as inline SVG: sharp at any size, coloured by the page's CSS so that dark mode is the page's business, no dependency."""

import math
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 360, 190  # user units; the page scales them
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22
MARKED = 12  # a line of at most so many points shows each, with whiskers; a longer one shows its interval as a band
BUCKETS = 300


@dataclass(frozen=True)
class Line:
    """A curve, its interval, or both. x, y, low, high: numbers of one length; y may be () for a band without a curve."""

    name: str
    colour: int  # number of a palette's colour; lines of one run share theirs
    x: list
    y: list = ()
    low: list = ()
    high: list = ()
    dashed: bool = False
    smooth: int = 1  # the curve is the mean of the last so many points, with the raw one drawn faintly behind
    note: str = ""  # for the legend, after the last value


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    xlabel: str
    lines: list
    levels: tuple = ()  # y of dashed rules across the chart, drawn where they fall inside it


def smoothed(values, window):
    """Trailing mean of `window` values, of fewer at the start."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values))]


def number(value):
    """A value as a table shows it: 12,103, 14.22, 0.6931, 4.00e-05; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, int) or value == 0 or abs(value) >= 999.95:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:#.4g}"


def ticks(low, high, count=4, whole=False):
    """About `count` round numbers in [low, high], 1, 2 or 5 times a power of ten apart; whole: integers."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    step = max(1, step) if whole else step
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def svg(chart):
    """The chart as an <svg> element. Colours come from the CSS variables --c0, --c1, .. and from currentColor."""
    xs = [x for line in chart.lines for x in line.x]
    ys = [y for line in chart.lines for part in (line.y, line.low, line.high) for y in part]
    (x0, x1), (y0, y1) = _range(xs, 0), _range(ys, 0.04)

    def at(x, y):
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return f"{LEFT + across * (WIDTH - LEFT - RIGHT):.1f},{HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM):.1f}"

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}, {escape(chart.unit)}">']
    for y in ticks(y0, y1):
        (left, height), (right, _) = (at(x, y).split(",") for x in (x0, x1))
        out.append(f'<path class="grid" d="M{left},{height}H{right}"/><text x="{LEFT - 5}" y="{height}" dy=".32em">{y:,.6g}</text>')
    out.append(f'<text x="{LEFT - 10}" y="{HEIGHT - 6}">{escape(chart.xlabel)}</text>')
    for x in ticks(x0, x1, whole=all(isinstance(x, int) for x in xs)):
        out.append(f'<text class="x" x="{at(x, y0).split(",")[0]}" y="{HEIGHT - 6}">{x:,.6g}</text>')
    for y in chart.levels:
        if y0 <= y <= y1:
            out.append(f'<path class="level" d="M{at(x0, y)}L{at(x1, y)}"/>')
    colours = sorted({line.colour for line in chart.lines})
    for line in chart.lines:
        out += _line(line, at, 3 * (colours.index(line.colour) - (len(colours) - 1) / 2))
    return "".join([*out, "</svg>"])


def _line(line, at, aside):
    """The elements of one line. aside: user units by which markers with whiskers move, so that those of several runs stand side by side."""
    style = f'style="--c:var(--c{line.colour})"'
    marked = line.y and len(line.x) <= MARKED
    if line.low and not marked:
        edge = _thin(line.x, line.high) + _thin(line.x, line.low)[::-1]
        yield f'<polygon class="band" {style} points="{_points(edge, at)}"/>'
    if line.smooth > 1:
        yield f'<polyline class="raw" {style} points="{_points(_thin(line.x, line.y), at)}"/>'
    curve = _thin(line.x, smoothed(line.y, line.smooth))
    yield f'<polyline class="curve{" dashed" if line.dashed else ""}" {style} points="{_points(curve, at)}"/>'
    if marked:
        whiskers = [f"M{at(x, low)}L{at(x, high)}" for x, low, high in zip(line.x, line.low, line.high)]
        dots = [f"M{at(*point)}h0" for point in curve]  # a stroke of no length with round ends is a dot
        place = f'transform="translate({aside:g})"' if whiskers else ""
        yield f'<path class="whisker" {style} {place} d="{"".join(whiskers)}"/><path class="dot" {style} {place} d="{"".join(dots)}"/>'


def _points(points, at):
    return " ".join(at(x, y) for x, y in points)


def _range(values, margin):
    """(low, high), widened by a share of their distance; around a single value by a tenth of it."""
    low, high = min(values), max(values)
    pad = (high - low) * margin if high > low else abs(low) / 10 or 1
    return low - pad, high + pad


def _thin(x, y):
    """(x, y) points: of a long line the lowest and the highest in each of BUCKETS stretches, so that no spike is lost."""
    count, kept = len(y), range(len(y))
    if count > 2 * BUCKETS:
        edges = [count * i // BUCKETS for i in range(BUCKETS + 1)]
        kept = sorted({pick(range(a, b), key=y.__getitem__) for a, b in pairwise(edges) for pick in (min, max)} | {0, count - 1})
    return [(x[i], y[i]) for i in kept]
