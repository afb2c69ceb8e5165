"""One HTML page that needs nothing beside itself: tables, pictures within, light and dark, narrow and wide."""

import base64
import html
import json
from collections.abc import Sequence

_STYLE = """
:root { color-scheme: light dark; --line: #80808055; --soft: #80808018; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 62rem; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem .25rem 0; text-align: left; white-space: nowrap; }
tbody tr:hover { background: var(--soft); }
figure { margin: 1.5rem 0; } figure img { width: 100%; max-width: 44rem; height: auto; }
figcaption, .note { color: #808080; font-size: .9rem; }
pre { background: var(--soft); overflow-x: auto; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.differs { color: #d62728; font-weight: 600; }
""".strip()


def page(result: dict, headline: str, tables: Sequence, figures: dict[str, str], appendices: Sequence) -> str:
    """The page.

    Args:
        result: of the comparison; it is put into the page as JSON too.
        headline: lines above everything else.
        tables: shown one after the other; see `compare_report.Table`.
        figures: SVG documents by title.
        appendices: tables that are folded up.
    """
    models = result["models"]
    title = f"{models[0]['config']} compared with {models[1]['config']}"
    body = [f"<h1>{_text(title)}</h1>", f"<pre>{_text(headline)}</pre>"]
    body += [_figure(name, svg) for name, svg in figures.items()]
    body += [_table(table) for table in tables]
    if result["not_measured"]:
        lines = "".join(f"<li>{_text(line)}</li>" for line in result["not_measured"])
        body.append(f"<h2>Not measured</h2><ul>{lines}</ul>")
    for table in appendices:
        body.append(f"<details><summary>{_text(table.title)}</summary>{_table(table)}</details>")
    if result["command"]:
        body.append(f"<h2>Command</h2><pre>{_text(result['command'])}</pre>")
    data = json.dumps(result).replace("<", "\\u003c")  # no "</script>" of a name ends it early
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
            *body,
            f'<script type="application/json" id="result">{data}</script>',
            "</body></html>\n",
        ]
    )


def _text(value: str) -> str:
    return html.escape(value)


def _figure(title: str, svg: str) -> str:
    encoded = base64.b64encode(svg.encode()).decode()
    image = f'<img alt="{_text(title)}" src="data:image/svg+xml;base64,{encoded}">'
    return f"<figure>{image}<figcaption>{_text(title)}</figcaption></figure>"


def _table(table) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in table.headers)
    rows = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in table.rows)
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    return (
        f'<h2>{_text(table.title)}</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def _cell(cell: str) -> str:
    kind = ' class="differs"' if cell == "DIFFERS" else ""
    return f"<td{kind}>{_text(cell)}</td>"
