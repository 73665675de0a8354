"""A report as one HTML page: tables, and figures with legends; style and charts are inline, and nothing is fetched."""

from html import escape
from pathlib import Path

from reports.charts import number, smoothed, svg

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
    """A table in a box that scrolls sideways. The first `text` columns are text, the others numbers; marked: the rows in bold."""

    def cells(tag, values):
        shown = [value if isinstance(value, str) else number(value) for value in values]
        return "".join(f"<{tag}{' class=n' if i >= text else ''}>{escape(value)}</{tag}>" for i, value in enumerate(shown))

    body = "".join(f"<tr{' class=strong' if row in marked else ''}>{cells('td', row)}</tr>" for row in rows)
    out = f'<div class="scroll"><table class="{kind}"><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<details><summary>{len(rows):,} rows</summary>{out}</details>" if len(rows) > FOLDED else out


def figure(chart):
    """A chart with its title, its unit and a legend that gives the last value of every line."""
    entries = []
    for line in chart.lines:
        kind = "band" if not line.y else "dashed" if line.dashed else ""
        last = f"<b>{number(smoothed(line.y, line.smooth)[-1])}</b>" if line.y else ""
        text = f"<span>{escape(line.name)} <em>{escape(line.note)}</em></span>{last}"
        entries.append(f'<li><i class="{kind}" style="--c:var(--c{line.colour})"></i>{text}</li>')
    caption = f"<figcaption><b>{escape(chart.title)}</b><span>{escape(chart.unit)}</span></figcaption>"
    return f"<figure>{caption}{svg(chart)}<ul>{''.join(entries)}</ul></figure>"


def page(title, lead, sections):
    """The page as text. sections: [(title, [(heading, a table as HTML or a list of Charts)])]; parts without content are left out."""
    light, dark = (";".join(f"--c{i}:{pair[theme]}" for i, pair in enumerate(COLOURS)) for theme in (0, 1))
    colours = f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
    style = colours + Path(__file__).with_name("page.css").read_text()
    body = [f"<h1>{escape(title)}</h1><p class=lead>{'<br>'.join(map(escape, lead))}</p>"]
    for name, parts in sections:
        body.append(f"<h2>{escape(name)}</h2>")
        for heading, content in parts:
            if isinstance(content, list):
                content = content and f'<div class="charts">{"".join(map(figure, content))}</div>'
            body.append(f"<h3>{escape(heading)}</h3>{content}" if content else "")
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    meta += f'<meta name="color-scheme" content="light dark"><title>{escape(title)}: {escape(", ".join(lead))}</title>'
    return f'<!doctype html><html lang="en"><head>{meta}<style>{style}</style></head><body>{"".join(body)}</body></html>\n'
