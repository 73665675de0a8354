"""Line charts as inline SVG: no dependency, and the page's CSS colours them, in dark mode too."""

import math
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 190  # user units; the page scales them
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22
# A line of at most so many points shows each, with whiskers; a longer one shows its interval as a band.
MARKED = 12
BUCKETS = 300


@dataclass(frozen=True)
class Line:
    """A curve, its interval, or both.

    x, y, low, high: numbers of one length; y may be () for a band without a curve.
    """

    name: str
    colour: int  # number of a palette's colour; lines of one run share theirs
    x: list
    y: list = ()
    low: list = ()
    high: list = ()
    dashed: bool = False
    smooth: int = 1  # the curve is the mean of the last so many points, with the raw one drawn faintly behind
    note: str = ""  # for the legend, after the last value
    cloud: bool = False  # dots alone, small and faint

    @property
    def marked(self):
        """Whether every point is shown, with its interval as a whisker."""
        return bool(self.y) and len(self.x) <= MARKED and not self.cloud

    @property
    def is_point(self):
        """Whether it is one value without an interval: a square, which a dot of a curve may lie in."""
        return self.marked and len(self.x) == 1 and not self.low


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    xlabel: str
    lines: list
    levels: tuple = ()  # y of dashed rules across the chart, drawn where they fall inside it
    least_range: float = 0.0  # of the y axis, or a change of 0.002 fills it and looks like a rise


@dataclass(frozen=True)
class Effect:
    """A row of a forest plot: a change, its interval, and the range of what random directions do."""

    name: str
    colour: int
    value: float
    low: float
    high: float
    null_low: float
    null_high: float


@dataclass(frozen=True)
class Forest:
    title: str
    unit: str
    effects: list


def smoothed(values, window):
    """Trailing mean of `window` values, of fewer at the start."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for end in range(1, len(sums)):
        start = max(0, end - window)
        means.append((sums[end] - sums[start]) / (end - start))
    return means


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
    """About `count` round numbers in [low, high], 1, 2 or 5 times a power of ten apart. whole: integers."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = 10 * power
    for multiple in (5, 2, 1):
        if multiple * power >= rough * 0.999:
            step = multiple * power
    if whole:
        step = max(1, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


@dataclass(frozen=True)
class Frame:
    """The ranges of a chart's axes: places of values in user units."""

    x0: float
    x1: float
    y0: float
    y1: float

    @classmethod
    def around(cls, lines, least_range=0.0):
        xs, ys = [], []
        for line in lines:
            xs += line.x
            ys += [*line.y, *line.low, *line.high]
        return cls(*_range(xs, margin=0), *widened(*_range(ys, margin=0.04), least_range))

    def across(self, x):
        return LEFT + (x - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def down(self, y):
        return HEIGHT - BOTTOM - (y - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def at(self, x, y):
        return f"{self.across(x):.1f},{self.down(y):.1f}"

    def path(self, points):
        return " ".join(self.at(x, y) for x, y in points)


def svg(chart):
    """The chart as an <svg> element.

    Colours come from the CSS variables --c0, --c1, .. and from currentColor.
    """
    frame = Frame.around(chart.lines, chart.least_range)
    label = f"{escape(chart.title)}, {escape(chart.unit)}"
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">', *_axes(chart, frame)]
    for y in chart.levels:
        if frame.y0 <= y <= frame.y1:
            out.append(f'<path class="level" d="M{frame.at(frame.x0, y)}L{frame.at(frame.x1, y)}"/>')
    colours = sorted({line.colour for line in chart.lines})
    for line in chart.lines:
        # markers with whiskers of several runs stand side by side, 3 units apart
        aside = 3 * (colours.index(line.colour) - (len(colours) - 1) / 2)
        out += _line(line, frame, aside)
    return "".join([*out, "</svg>"])


ROW, NAMES = 17, 150  # height of a row of a forest plot, width of the names on its left


def forest_svg(forest):
    """The forest plot as an <svg> element: a row an effect, the random directions as a bar behind it."""
    values = [0.0]
    for effect in forest.effects:
        values += [effect.low, effect.high, effect.null_low, effect.null_high]
    low, high = _range(values, margin=0.04)
    bottom = ROW * len(forest.effects) + 4

    def across(value):
        return NAMES + (value - low) / (high - low) * (WIDTH - NAMES - RIGHT)

    label = f"{escape(forest.title)}, {escape(forest.unit)}"
    out = [f'<svg viewBox="0 0 {WIDTH} {bottom + 18}" role="img" aria-label="{label}">']
    for x in ticks(low, high):
        out.append(f'<path class="grid" d="M{across(x):.1f},0V{bottom}"/>')
        out.append(f'<text class="x" x="{across(x):.1f}" y="{bottom + 13}">{x:,.6g}</text>')
    out.append(f'<path class="level" d="M{across(0):.1f},0V{bottom}"/>')
    for row, effect in enumerate(forest.effects):
        y = ROW * row + ROW / 2
        style = f'style="--c:var(--c{effect.colour})"'
        out.append(f'<text x="{NAMES - 8}" y="{y}" dy=".32em">{escape(_shortened(effect.name))}</text>')
        left, width = across(effect.null_low), across(effect.null_high) - across(effect.null_low)
        box = f'x="{left:.1f}" y="{y - 6}" height="12" width="{width:.1f}"'
        out.append(f'<rect class="band" {style} {box}/>')
        whisker = f"M{across(effect.low):.1f},{y}H{across(effect.high):.1f}"
        out.append(f'<path class="whisker" {style} d="{whisker}"/>')
        out.append(f'<path class="dot" {style} d="M{across(effect.value):.1f},{y}h0"/>')
    return "".join([*out, "</svg>"])


def _shortened(name, most=26):
    return name if len(name) <= most else name[: most - 1] + "…"


def _axes(chart, frame):
    """Rules and numbers."""
    for y in ticks(frame.y0, frame.y1):
        height = f"{frame.down(y):.1f}"
        yield f'<path class="grid" d="M{LEFT:.1f},{height}H{WIDTH - RIGHT:.1f}"/>'
        yield f'<text x="{LEFT - 5}" y="{height}" dy=".32em">{y:,.6g}</text>'
    yield f'<text x="{LEFT - 10}" y="{HEIGHT - 6}">{escape(chart.xlabel)}</text>'
    whole = True
    for line in chart.lines:
        whole = whole and all(isinstance(x, int) for x in line.x)
    for x in ticks(frame.x0, frame.x1, whole=whole):
        yield f'<text class="x" x="{frame.across(x):.1f}" y="{HEIGHT - 6}">{x:,.6g}</text>'


def _line(line, frame, aside):
    """The elements of one line; `aside`: user units by which its markers move to the right."""
    style = f'style="--c:var(--c{line.colour})"'
    if line.low and not line.marked:
        edge = _thin(line.x, line.high) + _thin(line.x, line.low)[::-1]
        yield f'<polygon class="band" {style} points="{frame.path(edge)}"/>'
    if line.smooth > 1:
        yield f'<polyline class="raw" {style} points="{frame.path(_thin(line.x, line.y))}"/>'
    if line.cloud:
        dots = [f"M{frame.at(x, y)}h0" for x, y in zip(line.x, line.y, strict=True)]
        yield f'<path class="dot cloud" {style} d="{"".join(dots)}"/>'
        return
    if line.is_point:
        x, y = frame.across(line.x[0]), frame.down(line.y[0])
        yield f'<path class="whisker" {style} d="M{x - 3.5:.1f},{y - 3.5:.1f}h7v7h-7z"/>'
        return
    curve = _thin(line.x, smoothed(line.y, line.smooth))
    kind = "curve dashed" if line.dashed else "curve"
    yield f'<polyline class="{kind}" {style} points="{frame.path(curve)}"/>'
    if not line.marked:
        return
    place = f'transform="translate({aside:g})"' if line.low else ""
    whiskers = [
        f"M{frame.at(x, low)}L{frame.at(x, high)}" for x, low, high in zip(line.x, line.low, line.high)
    ]
    yield f'<path class="whisker" {style} {place} d="{"".join(whiskers)}"/>'
    dots = [f"M{frame.at(x, y)}h0" for x, y in curve]  # a stroke of no length with round ends is a dot
    yield f'<path class="dot" {style} {place} d="{"".join(dots)}"/>'


def _range(values, margin):
    """(low, high), widened by a share of their distance; around a single value by a tenth of it."""
    low, high = min(values), max(values)
    pad = (high - low) * margin if high > low else abs(low) / 10 or 1
    return low - pad, high + pad


def widened(low, high, least):
    """(low, high), with as much added on either side as makes them `least` apart."""
    pad = max(0.0, least - (high - low)) / 2
    return low - pad, high + pad


def _thin(x, y):
    """(x, y) points of a line, thinned so that no spike is lost.

    Of a long line the lowest and the highest in each of BUCKETS stretches.
    """
    count = len(y)
    if count <= 2 * BUCKETS:
        return list(zip(x, y))
    kept = {0, count - 1}
    for bucket in range(BUCKETS):
        stretch = range(count * bucket // BUCKETS, count * (bucket + 1) // BUCKETS)
        kept.add(min(stretch, key=y.__getitem__))
        kept.add(max(stretch, key=y.__getitem__))
    return [(x[i], y[i]) for i in sorted(kept)]
