"""Writes the parts of the documents that follow from the code: the tables of keys, of configs and of models.

    python docs/generate.py
    python docs/generate.py --models    the table of models too, which takes half a minute
    python docs/generate.py --benchmarks output/benchmarks    the table of what fpn-d2 benchmark measured there too

Each part stands between two comments in its document; the rest of the document is written by hand.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
# Height and width in pixels: a photograph of 4:3 at the shorter side 800, padded.
MODEL_SIZE = (800, 1088)


def key_table(source: str, defaults: dict[str, object]) -> str:
    """Make the tables of keys from the comments in ``fpn_d2/config.py``.

    Args:
        source: text of ``config.py``: ``# ---- Title ---`` opens a section, ``new.A.B = value`` sets a key, and the
            comment lines above it say what it means.
        defaults: value of each key.

    Returns:
        Markdown: a heading and a table per section.

    Raises:
        ValueError: a key has no comment, or a key is set of which ``defaults`` knows nothing.
    """
    lines, comment = [], []
    for line in source.splitlines():
        if section := re.fullmatch(r"    # ---- (.+?) -+", line):
            lines += ["", f"### {section[1]}", "", "| key | default | meaning |", "| --- | --- | --- |"]
            comment = []
        elif text := re.fullmatch(r"    # (.+)", line):
            comment.append(text[1])
        elif key := re.fullmatch(r"    new\.([A-Z0-9_.]+) = (.+)", line):
            if key[2] != "CfgNode()":
                lines.append(_key_row(key[1], " ".join(comment), defaults))
            comment = []
    return "\n".join(lines).strip()


def _key_row(key: str, meaning: str, defaults: dict[str, object]) -> str:
    if not meaning:
        raise ValueError(f"{key} has no comment in config.py: say what it means, in which unit, and its options")
    if key not in defaults:
        raise ValueError(f"config.py names {key}, which add_fpn_d2_config does not add")
    value = defaults[key]
    default = f'"{value}"' if isinstance(value, str) else repr(value)
    return f"| `{key}` | `{default}` | {meaning.replace('|', chr(92) + '|')} |"


def config_table(folder: Path = CONFIGS) -> str:
    """Make the table of the configs from the headers of the files in ``folder``.

    Raises:
        ValueError: a header has no title or no line ``Twin:``.
    """
    lines = ["| config | model | Detectron2's published figures for its twin |", "| --- | --- | --- |"]
    for path in sorted(folder.rglob("*.yaml")):
        if path.name.startswith("Base-"):
            continue
        comments = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
        twins = [line[5:].strip() for line in comments if line.startswith("Twin:")]
        if len(twins) != 1 or not comments[0].endswith("."):
            raise ValueError(f"{path}: the header needs a title that ends with a full stop and one line 'Twin: ...'")
        title = re.sub(r" \(\d[\d,]* iterations of \d+ images\)", "", comments[0]).rstrip(".").replace(", COCO", "")
        figures = "none" if twins[0].startswith("none") else twins[0].split("Detectron2:")[1].strip().rstrip(".")
        name = path.relative_to(folder).as_posix()
        lines.append(f"| [{name.removesuffix('.yaml')}](../configs/{name}) | {title} | {figures} |")
    return "\n".join(lines)


def flatten(node: dict, prefix: str = "") -> dict[str, object]:
    """Return the keys of a nested dictionary in dotted form, ``{"A": {"B": 1}}`` as ``{"A.B": 1}``."""
    flat = {}
    for key, value in node.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def replace_part(document: str, name: str, part: str) -> str:
    """Put ``part`` between the comments ``<!-- name: begin ... -->`` and ``<!-- name: end -->`` of ``document``.

    Raises:
        ValueError: the document has no such comments.
    """
    found = re.search(rf"(<!-- {name}: begin[^>]*-->\n).*?(\n<!-- {name}: end -->)", document, re.DOTALL)
    if not found:
        raise ValueError(f"no comments <!-- {name}: begin --> and <!-- {name}: end --> in the document")
    return f"{document[: found.end(1)]}\n{part}\n{document[found.start(2) :]}"


def model_table() -> str:
    """Make the table of everything that is registered, for the image size that detectors on COCO see most often."""
    from fpn_d2.analysis.catalogue import list_components, show

    return show(list_components(MODEL_SIZE, progress=None), MODEL_SIZE, "markdown")


def benchmark_table(folder: str) -> str:
    """Make the table of what ``fpn-d2 benchmark`` has measured in ``folder``."""
    from fpn_d2.analysis.benchmark.rows import ROWS
    from fpn_d2.analysis.benchmark.run import read_results
    from fpn_d2.analysis.benchmark.table import show_table

    return show_table(read_results(folder), ROWS)


def generate(models: bool = False, benchmarks: str | None = None) -> dict[Path, str]:
    """Return the new text of every document that holds a generated part.

    Args:
        models: the table of models too.
        benchmarks: the folder with what was measured, for the table of benchmarks; None: without it.
    """
    from detectron2.config import CfgNode

    from fpn_d2.config import add_fpn_d2_config

    added = CfgNode()
    add_fpn_d2_config(added)
    keys = key_table((ROOT / "fpn_d2" / "config.py").read_text(), flatten(added))
    parts = [("configuration", "keys", keys), ("configs", "configs", config_table())]
    if models:
        parts.append(("models", "models", model_table()))
    if benchmarks is not None:
        parts.append(("benchmarks", "speed", benchmark_table(benchmarks)))
    paths = [ROOT / "docs" / f"{document}.md" for document, _, _ in parts]
    return {path: replace_part(path.read_text(), *part[1:]) for path, part in zip(paths, parts, strict=True)}


def main() -> int:
    """Write the documents that have changed and name them."""
    parser = argparse.ArgumentParser(description="Write the parts of the documents that follow from the code.")
    parser.add_argument("--models", action="store_true", help="the table of models too, which takes half a minute")
    parser.add_argument("--benchmarks", metavar="DIR", help="the table of benchmarks too, from what is in this folder")
    args = parser.parse_args()
    for path, text in generate(args.models, args.benchmarks).items():
        if path.read_text() != text:
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
