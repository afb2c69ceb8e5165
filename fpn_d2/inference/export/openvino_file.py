"""The graph of a detector in OpenVINO's own format, from its ONNX file."""

import json
import os
from pathlib import Path

from fpn_d2.errors import UserError


def read_for_openvino(onnx: Path):
    """The model of an ONNX file as OpenVINO has it.

    Raises:
        UserError: OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError:
        raise UserError("openvino is not installed: pip install 'fpn_d2[export]'") from None
    return openvino.convert_model(os.fspath(onnx))


def write_openvino(model, path: Path, metadata: dict) -> None:
    """Write a model and what its user has to know, whole or not at all.

    Args:
        model: out of :func:`read_for_openvino`.
        path: of the .xml file; the weights go beside it, to a .bin file.
        metadata: kept in the file as JSON, in its run-time information under fpn_d2, detector.
    """
    import openvino

    model.set_rt_info(json.dumps(metadata), ["fpn_d2", "detector"])
    unfinished = path.with_name(f"unfinished_{path.name}")
    openvino.save_model(model, os.fspath(unfinished), compress_to_fp16=False)
    for ending in (".bin", ".xml"):  # the .xml names no file: its weights are those beside it
        os.replace(unfinished.with_suffix(ending), path.with_suffix(ending))
