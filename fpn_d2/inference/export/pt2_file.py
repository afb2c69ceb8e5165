"""The graph of a detector as a file of ``torch.export``."""

import json
import os
from pathlib import Path

import torch

from .graph import DetectorGraph
from .program import export_program


def write_pt2(graph: DetectorGraph, path: Path, metadata: dict) -> None:
    """Write ``graph``, made with :func:`.nms.nms_mask`, and what its user has to know.

    Args:
        graph: of a detector.
        path: of the file.
        metadata: kept in the file as its extra file "metadata.json".
    """
    program = export_program(graph)
    unfinished = path.with_name(f"unfinished_{path.name}")  # PyTorch asks for the ending
    torch.export.save(program, unfinished, extra_files={"metadata.json": json.dumps(metadata)})
    os.replace(unfinished, path)
