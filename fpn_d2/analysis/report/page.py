"""The page: one HTML file with all that it shows inside, no script, and nothing that is fetched."""

import base64
import html
import math
from collections.abc import Iterable, Sequence

import cv2
import numpy as np

_STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #ffffff; --text: #1c2230; --quiet: #5a6475;
  --line: #d5dae3; --accent: #1f5fd0; }
@media (prefers-color-scheme: dark) { :root { --ground: #12151b; --card: #1b2029; --text: #e6e9ef; --quiet: #9aa5b8;
  --line: #343c4a; --accent: #7fb0ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
header, main { max-width: 1240px; margin: auto; padding: 1rem 1.2rem; }
h1 { font-size: 1.5rem; margin: .3rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
a { color: var(--accent); }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.2rem;
  margin-bottom: 1rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: .8rem 0 0; padding: 0; list-style: none; }
.tiles li { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .5rem 1rem; }
.tiles b { display: block; font-size: 1.25rem; }
.quiet, .tiles span, figcaption { color: var(--quiet); font-size: .9rem; }
.missing { color: var(--quiet); font-style: italic; overflow-wrap: anywhere; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
.scroll { overflow-x: auto; margin-bottom: 1rem; }
.small, .large { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.large { grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
.scroll > svg { min-width: 820px; }
svg { display: block; width: 100%; height: auto; color: var(--text); }
svg text { fill: currentColor; }
img { width: 100%; display: block; border-radius: .3rem; }
figure { margin: 0; }
figcaption { overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
table.text td:first-child { white-space: nowrap; }
table.text td + td { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 8rem;
  vertical-align: top; }
pre { overflow: auto; max-height: 30rem; font-size: .85rem; }
summary { cursor: pointer; }
""".strip()
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def escape(text: object) -> str:
    """Text for HTML."""
    return html.escape(str(text))


def page(title: str, top: str, sections: dict[str, str]) -> str:
    """The whole file.

    Args:
        title: plain text.
        top: HTML below the title.
        sections: HTML by their titles, plain text.
    """
    names = {name: f"part{number}" for number, name in enumerate(sections)}
    links = "".join(f'<a href="#{own}">{escape(name)}</a>' for name, own in names.items())
    body = "\n".join(
        f'<section id="{names[name]}"><h2>{escape(name)}</h2>\n{content}\n</section>'
        for name, content in sections.items()
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{_STYLE}\n</style>\n</head>\n<body>\n<header>\n<h1>{escape(title)}</h1>\n<nav>{links}</nav>\n{top}\n"
        f"</header>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "") -> str:
    """A table that scrolls by itself where there is little room; numbers with one decimal, nan as nothing."""
    lines = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(_cell(value))}</td>" for value in row) + "</tr>" for row in rows]
    return f'<div class="scroll"><table class="{kind}">' + "\n".join(lines) + "</table></div>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.1f}"
    return str(value)


def tiles(values: dict[str, str]) -> str:
    """Figures in large letters above their names."""
    return (
        '<ul class="tiles">'
        + "".join(f"<li><b>{escape(value)}</b><span>{escape(name)}</span></li>" for name, value in values.items())
        + "</ul>"
    )


def missing(text: str) -> str:
    """Why something is not shown."""
    return f'<p class="missing">Not shown: {escape(text)}</p>'


def paragraph(text: str, kind: str = "") -> str:
    """Plain text."""
    return f'<p class="{kind}">{escape(text)}</p>'


def picture(pixels: np.ndarray, name: str, quality: int = 82) -> str:
    """A picture, (H, W, 3), BGR, within the page."""
    data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
    text = base64.b64encode(data).decode("ascii")
    height, width = pixels.shape[:2]
    size = f'width="{width}" height="{height}" style="height: auto"'
    return (
        f'<figure><img {size} alt="{escape(name)}" src="data:image/jpeg;base64,{text}">'
        f"<figcaption>{escape(name)}</figcaption></figure>"
    )
