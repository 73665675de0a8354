"""PNGs, for slides and papers: the charts of a sweep, clusters of texts, a map of pairs.

matplotlib is imported here only.
"""

import math
from pathlib import Path

from reports.charts import smoothed, ticks, widened
from reports.figures import POINT


def plot_chart(path, chart):
    """A charts.Chart: curves, intervals and levels as charts.svg shows them on the page."""

    def draw(figure, ax):
        for line in chart.lines:
            _draw_line(ax, line)
        bottom, top = widened(*ax.get_ylim(), chart.least_range)
        ax.set_ylim(bottom, top)
        for level in chart.levels:
            if bottom <= level <= top:
                ax.axhline(level, linestyle=":", color="grey")
        if chart.last_x < math.inf:
            ax.set_xticks(ticks(min(ax.get_xlim()), chart.last_x))
        ax.set_xlabel(chart.xlabel)
        ax.set_title(chart.title, loc="left", fontweight="bold", pad=20)
        ax.text(0, 1.02, chart.unit, transform=ax.transAxes, fontsize="small")
        figure.legend(loc="outside lower left", fontsize="small", frameon=False, ncols=2)

    _figure(path, draw)


def _draw_line(ax, line):
    colour = f"C{line.colour}"
    label = f"{line.name}: {line.note}" if line.note else line.name
    if line.low and not line.marked:
        ax.fill_between(
            line.x, line.low, line.high, alpha=0.15, color=colour, label=None if line.y else label
        )
    if not line.y:
        return
    if line.cloud:
        ax.plot(line.x, line.y, ".", color=colour, alpha=0.4, markersize=4, label=label)
        return
    if line.square:
        ax.plot(line.x, line.y, "s", color=colour, markersize=8, fillstyle="none", label=label)
        ax.vlines(line.x if line.low else [], line.low, line.high, color=colour)
        return
    if line.smooth > 1:
        ax.plot(line.x, line.y, color=colour, alpha=0.25, linewidth=0.8)
    style = "--" if line.dashed else "-"
    ax.plot(line.x, smoothed(line.y, line.smooth), style, color=colour, linewidth=1.4, label=label)
    if line.marked:
        ax.plot(line.x, line.y, "o", color=colour, markersize=4)
        ax.vlines(line.x if line.low else [], line.low, line.high, color=colour)


def plot_heatmap(path, rows, columns, values, title):
    """values[r][c], changes of a separation, as labelled cells: red above 0, blue below.

    Full colour is the largest change, and one point at least: changes that do not matter stay pale.
    """
    most = max([POINT, *(max(map(abs, line)) for line in values)])

    def draw(figure, ax):
        image = ax.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
        ax.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
        ax.set_yticks(range(len(rows)), rows)
        for r, line in enumerate(values):
            for c, value in enumerate(line):
                colour = "white" if abs(value) > 0.6 * most else "black"
                ax.text(c, r, f"{value:+.2f}", ha="center", va="center", color=colour, fontsize="small")
        ax.set_title(title)
        figure.colorbar(image, ax=ax, label="of 100")

    _figure(path, draw, size=(2.5 + 0.8 * len(columns), 1.5 + 0.5 * len(rows)))


def plot_clusters(path, points, label, title):
    """Texts as points of their first three principal components.

    points (n, 3), label (n,) 0 unsafe, 1 safe.
    """

    def draw(_, ax):
        for value, name, colour in ((0, "unsafe", "#c8571b"), (1, "safe", "#1f6fb2")):
            mine = points[label == value]
            ax.scatter(*mine.T, s=6, alpha=0.6, color=colour, label=f"{name}, {len(mine):,} texts")
        ax.set(xlabel="component 1", ylabel="component 2", zlabel="component 3", title=title)
        ax.set_box_aspect(None, zoom=0.9)  # room for the names of the axes
        ax.legend(loc="upper left", fontsize="small")

    _figure(path, draw, projection="3d")


def _figure(path, draw, size=(7.0, 4.5), **axes):
    import matplotlib

    matplotlib.use("Agg")  # no display on a rented machine
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=size, subplot_kw=axes, layout="constrained")
    draw(figure, ax)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
