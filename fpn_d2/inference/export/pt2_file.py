"""The graph of a detector as a file of ``torch.export``, or compiled from one by AOTInductor."""

import json
import os
from pathlib import Path

import torch

from fpn_d2.errors import UserError
from fpn_d2.native.build import find_compiler

from .graph import DetectorGraph
from .program import export_program


def write_pt2(graph: DetectorGraph, path: Path, metadata: dict, stages: Path | None = None) -> None:
    """Write ``graph``, made with :func:`.nms.nms_mask`, and what its user has to know.

    Args:
        graph: of a detector.
        path: of the file.
        metadata: kept in the file as its extra file "metadata.json".
        stages: another file, for the same graph which returns what led to the detections too; None: none.
    """
    program = export_program(graph)
    unfinished = _unfinished(path)
    torch.export.save(program, unfinished, extra_files={"metadata.json": json.dumps(metadata)})
    os.replace(unfinished, path)
    if stages is not None:
        graph.with_stages = True
        torch.export.save(export_program(graph), stages)


def write_aoti(graph: DetectorGraph, path: Path, metadata: dict) -> None:
    """Compile ``graph`` for the processor of this machine; see :func:`write_pt2`.

    Args:
        graph: of a detector.
        path: of the file.
        metadata: kept in the file, as JSON under the key "detector".

    Raises:
        UserError: there is no C++ compiler that PyTorch's can call, or it could not compile the detector.
    """
    from torch._inductor import config
    from torch._inductor.exc import InductorError

    try:
        compiler = find_compiler()
    except OSError as error:
        raise UserError(f"--to aoti compiles C++: {error}") from None
    if len(compiler) != 1:
        raise UserError(f"--to aoti needs g++ or clang++; found {' '.join(compiler)}, which PyTorch cannot call")
    program, unfinished = export_program(graph), _unfinished(path)
    options = {"aot_inductor.metadata": {"detector": json.dumps(metadata)}}
    if {"masks", "keypoint_maps"} & set(graph.detections):
        # Convolutions over as many boxes as there are detections: with the layout that the compiler chooses for them it
        # reads their results in another, as it does not know that there is a number of boxes that is not 1.
        options["layout_optimization"] = False
    with config.patch({"cpp.cxx": (None, *compiler)}):
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(unfinished), inductor_configs=options)
        except InductorError as error:
            said = " ".join(str(error).split())[:300]
            raise UserError(f"this detector cannot be compiled, PyTorch's compiler says: {said}") from error
    os.replace(unfinished, path)


def _unfinished(path: Path) -> Path:
    return path.with_name(f"unfinished_{path.name}")  # PyTorch asks for the ending
