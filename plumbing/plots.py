"""Figures of an AQI sweep. matplotlib is optional (`pip install matplotlib`) and imported here only; every function writes one png."""

from pathlib import Path


def _figure(path, draw, size=(7.0, 4.5), **axes):
    import matplotlib

    matplotlib.use("Agg")  # no display on a rented machine
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=size, subplot_kw=axes, layout="constrained")
    draw(figure, ax)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plot_curve(path, lambdas, estimate, low, high, shuffled=None, control=None, title=""):
    """AQI over lambda with its interval. shuffled: (low, high) of permuted labels; control: a random direction's curve; all of length K."""

    def draw(_, ax):
        ax.fill_between(lambdas, low, high, alpha=0.25, color="C0", label="95 % interval")
        ax.plot(lambdas, estimate, "o-", color="C0", label="steered")
        if control is not None:
            ax.plot(lambdas, control, "s--", color="C1", label="random direction, same norm")
        if shuffled is not None:
            ax.fill_between(lambdas, *shuffled, alpha=0.25, color="grey", label="shuffled labels")
        ax.set(xlabel="lambda", ylabel="AQI (sweep)", title=title, xticks=lambdas)
        ax.legend()

    _figure(path, draw)


def plot_axioms(path, lambdas, curves, title=""):
    """One line per axiom; curves: {axiom: (K,) AQI}."""

    def draw(_, ax):
        for axiom, values in curves.items():
            ax.plot(lambdas, values, "o-", label=axiom, linewidth=3 if axiom == "overall" else 1.2)
        ax.set(xlabel="lambda", ylabel="AQI (sweep)", title=title, xticks=lambdas)
        ax.legend(fontsize="small")

    _figure(path, draw)


def plot_heatmap(path, rows, columns, values, title=""):
    """values[r][c] as coloured, labelled cells: axioms over models, or over lambdas."""

    def draw(figure, ax):
        image = ax.imshow(values, cmap="viridis", aspect="auto")
        ax.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
        ax.set_yticks(range(len(rows)), rows)
        for r, line in enumerate(values):
            for c, value in enumerate(line):
                ax.text(c, r, f"{value:.1f}", ha="center", va="center", color="white", fontsize="small")
        ax.set_title(title)
        figure.colorbar(image, ax=ax)

    _figure(path, draw, size=(2.5 + 0.8 * len(columns), 1.5 + 0.5 * len(rows)))


def plot_clusters(path, points, label, title=""):
    """points (n, 3), label (n,) 0 unsafe, 1 safe."""

    def draw(_, ax):
        for value, name, colour in ((0, "unsafe", "#d1495b"), (1, "safe", "#2e7d5b")):
            ax.scatter(*points[label == value].T, s=6, alpha=0.6, color=colour, label=name)
        ax.set_title(title)
        ax.legend()

    _figure(path, draw, projection="3d")
