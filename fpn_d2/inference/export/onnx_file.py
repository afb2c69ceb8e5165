"""The graph of a detector as an ONNX file of standard operators."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fpn_d2.errors import UserError
from fpn_d2.files import UNFINISHED

from .graph import DetectorGraph
from .program import export_program

OPSET = 18  # RoiAlign has the coordinates of Detectron2's from 16 on; 18 is the lowest that PyTorch writes
_LARGEST = 2**31 - 2**24  # bytes of a protobuf, with room for the graph


def write_onnx(graph: DetectorGraph, path: Path, metadata: dict, stages: Path | None = None) -> None:
    """Write ``graph`` and what its user has to know.

    Args:
        graph: of a detector, made with :func:`.nms.nms_mask_as_one`.
        path: of the file. Weights of more than 2 GB, which the format cannot hold, go to a file beside it.
        metadata: kept in the file under its keys, each value as JSON.
        stages: another file, for the same graph which returns what led to the detections too; None: none.

    Raises:
        UserError: the packages that write ONNX are not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'fpn_d2[export]'") from None
    graph.with_stages = True
    names = graph.output_names
    with _quiet():
        written = torch.onnx.export(
            export_program(graph),
            opset_version=OPSET,
            custom_translation_table={torch.ops.fpn_d2.nms_mask.default: _nms_mask},
            input_names=["images", "image_sizes"],
            output_names=names,
            verbose=False,
        )
    model = written.model
    model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})
    for part in [*model.graph.all_nodes(), *model.graph.inputs, *model.graph.outputs]:
        part.metadata_props.clear()  # where in the source it was traced
    external = sum(value.numel() * value.element_size() for value in graph.state_dict().values()) > _LARGEST
    if stages is not None:
        written.save(stages, external_data=external)
    del model.graph.outputs[len(graph.detections) :]
    unfinished = path if external else path.with_name(path.name + UNFINISHED)  # a file beside it goes by its name
    written.save(unfinished, external_data=external)
    os.replace(unfinished, path)


def _nms_mask(boxes, scores, iou_threshold: float):
    """:func:`.nms.nms_mask` in ONNX's operators: the indices of what is kept, turned into a mask."""
    from onnx import TensorProto
    from onnxscript import opset18 as op

    all_of_them, above = op.Constant(value_int=2**31 - 1), op.Constant(value_float=0.0)
    kept = op.NonMaxSuppression(boxes, scores, all_of_them, op.Constant(value_float=iou_threshold), above)
    nothing = op.Expand(op.Constant(value_float=0.0), op.Shape(scores))
    ones = op.Expand(op.Constant(value_float=1.0), op.Shape(kept, start=0, end=1))
    return op.Cast(op.ScatterND(nothing, kept, ones), to=TensorProto.BOOL)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter logs of its own steps."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
