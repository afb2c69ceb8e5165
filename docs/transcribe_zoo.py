"""Transcribes the tables of Detectron2's MODEL_ZOO.md into ``zoo_baselines.json``.

python -m docs.transcribe_zoo MODEL_ZOO.md COMMIT > fpn_d2/analysis/published/zoo_baselines.json
"""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

SOURCE = "https://github.com/facebookresearch/detectron2/blob/{commit}/MODEL_ZOO.md"
MEASURED_ON = "8 NVIDIA V100 with NVLink (Big Basin), as MODEL_ZOO.md says; inference with batch size 1"

# Heading of a column in the document -> key of a row. Percentages stay percentages.
_NUMBERS = {
    "train time (s/iter)": "train_s_per_iter",
    "train time (s/im)": "train_s_per_im",
    "inference time (s/im)": "inference_s_per_im",
    "train mem (GB)": "train_memory_gb",
    "box AP": "box_AP",
    "box AP50": "box_AP50",
    "mask AP": "mask_AP",
    "kp. AP": "keypoint_AP",
    "PQ": "PQ",
    "prop. AR": "proposal_AR",
}
_WORDS = {"Name": "name", "lr sched": "schedule", "epochs": "epochs", "model id": "model_id"}


class _Tables(HTMLParser):
    """Collects the cells of all tables, with the headings of each table."""

    def __init__(self):
        super().__init__()
        self.headings: list[str] = []
        self.rows: list[tuple[list[str], list[str], list[str]]] = []
        self._cell: list[str] | None = None
        self._cells: list[str] = []
        self._links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.headings = []
        elif tag == "tr":
            self._cells, self._links = [], []
        elif tag in ("td", "th"):
            self._cell = []
        elif tag == "br" and self._cell is not None:
            self._cell.append(" ")
        elif tag == "a":
            self._links.append(dict(attrs).get("href") or "")

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            text = " ".join("".join(self._cell).split())
            (self.headings if tag == "th" else self._cells).append(text)
            self._cell = None
        elif tag == "tr" and self._cells:
            self.rows.append((list(self.headings), self._cells, self._links))


def transcribe(document: str, commit: str) -> dict:
    """The rows of every table that has models in it.

    Args:
        document: MODEL_ZOO.md.
        commit: of Detectron2's repository, that the document is from.

    Returns:
        "source", "measured_on" and "rows": for each a "config" as ``COCO-Detection/faster_rcnn_R_50_FPN_1x``, words
        and numbers. What the document leaves empty or gives as N/A is None; columns that a table lacks are missing.

    Raises:
        ValueError: a column has a heading that is not known here, or a cell that should be a number is not.
    """
    parser = _Tables()
    parser.feed(document)
    rows: dict[str, dict] = {}
    for headings, cells, links in parser.rows:
        config = next((link for link in links if link.startswith("configs/")), None)
        if config is None:  # a row about the row above it
            continue
        row: dict = {"config": re.sub(r"^configs/|\.(yaml|py)$", "", config)}
        for heading, cell in zip(headings, cells, strict=True):
            if heading in _WORDS:
                row[_WORDS[heading]] = cell
            elif heading in _NUMBERS:
                row[_NUMBERS[heading]] = None if cell in ("", "N/A") else float(cell)
            elif heading != "download":
                raise ValueError(f"the table of {row['config']} has a column {heading!r}, which is not known here")
        row["weights"] = next((link for link in links if link.endswith(".pkl")), None)
        # Some baselines stand in several tables, one of which names them "Baseline ...".
        rows.setdefault(row["config"], row)
    return {"source": SOURCE.format(commit=commit), "measured_on": MEASURED_ON, "rows": list(rows.values())}


if __name__ == "__main__":
    data = transcribe(Path(sys.argv[1]).read_text(encoding="utf-8"), sys.argv[2])
    head = json.dumps({key: data[key] for key in ("source", "measured_on")}, indent=1)
    body = ",\n".join("  " + json.dumps(row) for row in data["rows"])
    print(f'{head[:-2]},\n "rows": [\n{body}\n ]\n}}')
