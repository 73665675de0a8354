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

    x, y, low, high: numbers of one length; y may be () for a band without a curve. A line without a name has
    no entry of its own in the legend.
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
    square: bool = False  # of one value: a square, which a dot of a curve may lie in

    @property
    def marked(self):
        """Whether every point is shown, with its interval as a whisker."""
        return bool(self.y) and len(self.x) <= MARKED and not self.cloud


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    xlabel: str
    lines: list
    levels: tuple = ()  # y of dashed rules across the chart, drawn where they fall inside it
    least_range: float = 0.0  # of the y axis, or a change of 0.002 fills it and looks like a rise
    covers: tuple = ()  # y that the axis reaches to: both ends of a share, or 0
    marks: tuple = ()  # Marks that explain the lines without a name
    last_x: float = math.inf  # where the numbers of the x axis end: what stands beyond it has no x


@dataclass(frozen=True)
class Mark:
    """An entry of a legend that is no line. kind: a class of the page's style, "square" for example."""

    kind: str
    text: str
    value: str = ""


@dataclass(frozen=True)
class Effect:
    """A row of a forest plot: a change, its interval, and what it is to be read beside.

    null_sd: of what random directions do; drawn as a bar of two of them, or as `cloud`, the directions
    themselves. relevant: rules on both sides of 0.
    """

    name: str
    colour: int
    value: float
    low: float
    high: float
    null_sd: float
    cloud: tuple = ()
    square: float | None = None
    diamond: float | None = None
    relevant: float | None = None

    def reach(self):
        """All of its numbers that the axis has to hold."""
        ends = [self.value, self.low, self.high, *self.cloud]
        if not self.cloud:
            ends += [-2 * self.null_sd, 2 * self.null_sd]
        if self.relevant is not None:
            ends += [-self.relevant, self.relevant]
        return ends + [value for value in (self.square, self.diamond) if value is not None]


@dataclass(frozen=True)
class Forest:
    title: str
    unit: str
    effects: list
    marks: tuple = ()
    covers: tuple = (0.0,)


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


def scattered(i):
    """A place in [0, 1) for dot i of a cloud, by the golden ratio.

    Directions of one kind are neighbours in the list, and do not form a line.
    """
    return i * 0.618 % 1


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
    def around(cls, chart):
        xs, ys = [], list(chart.covers)
        for line in chart.lines:
            xs += line.x
            ys += [*line.y, *line.low, *line.high]
        return cls(*_range(xs, margin=0), *widened(*_range(ys, margin=0.04), chart.least_range))

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
    frame = Frame.around(chart)
    ends = []
    for line in chart.lines:
        if line.name and line.y:
            ends.append(f"{line.name} {number(line.y[0])} to {number(line.y[-1])}")
    out = [_opened(chart, HEIGHT, ends), *_axes(chart, frame)]
    for y in chart.levels:
        if frame.y0 <= y <= frame.y1:
            out.append(f'<path class="level" d="M{frame.at(frame.x0, y)}L{frame.at(frame.x1, y)}"/>')
    # markers with whiskers stand side by side, 3 units apart, many of them closer: near their x
    whiskered = [line for line in chart.lines if line.marked and line.low and not line.square]
    apart = min(3.0, 9.0 / max(1, len(whiskered)))
    aside = apart * (1 - len(whiskered)) / 2
    for line in chart.lines:
        out += _line(line, frame, aside)
        if line in whiskered:
            aside += apart
    return "".join([*out, "</svg>"])


def _opened(chart, height, values):
    """The <svg> tag, which says to who cannot see it what the chart is of, and its values."""
    label = f"{chart.title}, {chart.unit}"
    if values:
        label += f": {'; '.join(values)}"
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">'


# Heights of a row of a forest plot and of one with a cloud, of a plot of few such; width of the names.
ROW, CLOUDY_ROW, LEAST, NAMES = 17, 24, 96, 150


def forest_svg(forest):
    """The forest plot as an <svg> element: a row an effect, the random directions behind it."""
    values = list(forest.covers)
    said = []
    for effect in forest.effects:
        values += effect.reach()
        said.append(f"{effect.name} {effect.value:+.3g} [{effect.low:+.3g}, {effect.high:+.3g}]")
    low, high = _range(values, margin=0.04)
    row = ROW
    if any(effect.cloud for effect in forest.effects):
        row = max(CLOUDY_ROW, LEAST / len(forest.effects))
    bottom = row * len(forest.effects) + 4

    def across(value):
        return NAMES + (value - low) / (high - low) * (WIDTH - NAMES - RIGHT)

    out = [_opened(forest, bottom + 18, said)]
    for x in ticks(low, high):
        out.append(f'<path class="grid" d="M{across(x):.1f},0V{bottom:g}"/>')
        out.append(f'<text class="x" x="{across(x):.1f}" y="{bottom + 13:g}">{x:,.6g}</text>')
    out.append(f'<path class="level" d="M{across(0):.1f},0V{bottom:g}"/>')
    for number_of_row, effect in enumerate(forest.effects):
        out += _effect(effect, row, row * (number_of_row + 0.5), across)
    return "".join([*out, "</svg>"])


def _effect(effect, row, y, across):
    """The elements of a row, `row` high, whose middle is at y."""
    style = f'style="--c:var(--c{effect.colour})"'
    yield f'<text x="{NAMES - 8}" y="{y:g}" dy=".32em">{escape(_shortened(effect.name))}</text>'
    if effect.relevant is not None:
        top, bottom = y - row / 2 + 1, y + row / 2 - 1
        for value in (-effect.relevant, effect.relevant):
            yield f'<path class="limit" d="M{across(value):.1f},{top:g}V{bottom:g}"/>'
    if effect.cloud:
        dots = []
        for i, value in enumerate(effect.cloud):
            height = y + 0.7 * row * (scattered(i) - 0.5)
            dots.append(f"M{across(value):.1f},{height:.1f}h0")
        yield f'<path class="dot cloud" {style} d="{"".join(dots)}"/>'
    else:
        left, right = across(-2 * effect.null_sd), across(2 * effect.null_sd)
        box = f'x="{left:.1f}" y="{y - 6:g}" height="12" width="{right - left:.1f}"'
        yield f'<rect class="band" {style} {box}/>'
    whisker = f"M{across(effect.low):.1f},{y:g}H{across(effect.high):.1f}"
    yield f'<path class="whisker" {style} d="{whisker}"/>'
    yield f'<path class="dot" {style} d="M{across(effect.value):.1f},{y:g}h0"/>'
    if effect.square is not None:
        yield f'<path class="whisker" {style} d="{_square(across(effect.square), y)}"/>'
    if effect.diamond is not None:
        x = across(effect.diamond)
        yield f'<path class="whisker" {style} d="M{x - 5:.1f},{y:g}l5,-5l5,5l-5,5z"/>'


def _square(x, y):
    return f"M{x - 3.5:.1f},{y - 3.5:.1f}h7v7h-7z"


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
    for x in ticks(frame.x0, min(frame.x1, chart.last_x), whole=whole):
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
    whiskers = []
    for x, low, high in zip(line.x, line.low, line.high):
        whiskers.append(f"M{frame.at(x, low)}L{frame.at(x, high)}")
    if line.square:
        kind = "whisker dashed" if line.dashed else "whisker"
        (x,), (y,) = line.x, line.y
        outline = _square(frame.across(x), frame.down(y))
        yield f'<path class="{kind}" {style} d="{outline}{"".join(whiskers)}"/>'
        return
    curve = _thin(line.x, smoothed(line.y, line.smooth))
    kind = "curve dashed" if line.dashed else "curve"
    yield f'<polyline class="{kind}" {style} points="{frame.path(curve)}"/>'
    if not line.marked:
        return
    place = f'transform="translate({aside:g})"' if line.low else ""
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
