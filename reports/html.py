"""A report as one HTML page: tables, and figures with legends.

Style and charts are inline, and nothing is fetched.
"""

from html import escape
from pathlib import Path

from reports.charts import Forest, forest_svg, number, smoothed, svg

COLOURS = (
    ("#1f6fb2", "#6db3f2"),
    ("#c8571b", "#f49a63"),
    ("#2c8458", "#68c795"),
    ("#8b4aa8", "#c898e0"),
    ("#b3304c", "#f08297"),
    ("#77702a", "#cfc56b"),
    ("#54616e", "#a9b7c4"),
    ("#0f8286", "#5cc8cb"),
)  # fmt: skip  on light paper, on dark
FOLDED = 40  # longer tables are folded behind their number of rows


def table(head, rows, text=1, marked=(), kind=""):
    """A table in a box that scrolls sideways. The first `text` columns are text, the others numbers; marked:
    the rows in bold.
    """
    body = [_row("td", row, text, " class=strong" if row in marked else "") for row in rows]
    content = f"<thead>{_row('th', head, text)}</thead><tbody>{''.join(body)}</tbody>"
    box = f'<div class="scroll"><table class="{kind}">{content}</table></div>'
    return f"<details><summary>{len(rows):,} rows</summary>{box}</details>" if len(rows) > FOLDED else box


def _row(tag, values, text, attribute=""):
    cells = []
    for i, value in enumerate(values):
        shown = value if isinstance(value, str) else number(value)
        aligned = " class=n" if i >= text else ""
        cells.append(f"<{tag}{aligned}>{escape(shown)}</{tag}>")
    return f"<tr{attribute}>{''.join(cells)}</tr>"


def sentence(text, strong=""):
    """A paragraph, which begins with `strong` in bold."""
    start = f"<b>{escape(strong)}</b> " if strong else ""
    return f"<p class=said>{start}{escape(text)}</p>"


def figure(chart):
    """A Chart or a Forest with its title, its unit and its legend, where a line has its last value."""
    caption = f"<figcaption><b>{escape(chart.title)}</b><span>{escape(chart.unit)}</span></figcaption>"
    entries = []
    if isinstance(chart, Forest):
        drawn = forest_svg(chart)
    else:
        drawn = svg(chart)
        entries += [_line_entry(line) for line in chart.lines if line.name]
    for mark in chart.marks:
        entries.append(_entry(mark.kind, "--soft", escape(mark.text), mark.value))
    return f"<figure>{caption}{drawn}<ul>{''.join(entries)}</ul></figure>"


def _line_entry(line):
    """A line's place in the legend."""
    kind, last = "dashed" if line.dashed else "", ""
    if line.cloud:
        kind = "cloud"
    elif not line.y:
        kind = "band"
    else:
        last = number(smoothed(line.y, line.smooth)[-1])
    if line.square:
        kind = f"square {kind}"
    text = f"{escape(line.name)} <em>{escape(line.note)}</em>"
    return _entry(kind, f"--c{line.colour}", text, last)


def _entry(kind, colour, text, value):
    shown = f"<b>{escape(value)}</b>" if value else ""
    return f'<li><i class="{kind}" style="--c:var({colour})"></i><span>{text}</span>{shown}</li>'


def page(title, lead, sections):
    """The page as text.

    sections: [(title, [(heading, a table as HTML or a list of Charts)])]; parts without content are left out.
    """
    body = [f"<h1>{escape(title)}</h1><p class=lead>{'<br>'.join(map(escape, lead))}</p>"]
    for name, parts in sections:
        body.append(f"<h2>{escape(name)}</h2>")
        for heading, content in parts:
            if isinstance(content, list) and content:
                content = f'<div class="charts">{"".join(map(figure, content))}</div>'
            if content:
                body.append(f"<h3>{escape(heading)}</h3>{content}")
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    heading = f"{escape(title)}: {escape(', '.join(lead))}"
    meta += f'<meta name="color-scheme" content="light dark"><title>{heading}</title>'
    style = _colours() + Path(__file__).with_name("page.css").read_text()
    head = f"<head>{meta}<style>{style}</style></head>"
    return f'<!doctype html><html lang="en">{head}<body>{"".join(body)}</body></html>\n'


def _colours():
    """The CSS variables --c0, --c1, .. of COLOURS in both themes."""
    light = ";".join(f"--c{i}:{on_light}" for i, (on_light, _) in enumerate(COLOURS))
    dark = ";".join(f"--c{i}:{on_dark}" for i, (_, on_dark) in enumerate(COLOURS))
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
