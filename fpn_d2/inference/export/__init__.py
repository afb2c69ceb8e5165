"""A trained detector as one file that runs without Detectron2 and without this package."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fpn_d2.errors import UserError
from fpn_d2.files import writable_folder

from ..predictor import Predictor
from .graph import DetectorGraph, graph_of

# The file of each format; what runs it is NAME_runner.py.
FORMATS = {"onnx": "detector.onnx", "pt2": "detector.pt2", "aoti": "detector.pt2", "openvino": "detector.xml"}
__all__ = ["FORMATS", "DetectorGraph", "Exported", "export_detector", "graph_of"]


@dataclass
class Exported:
    """What was written.

    Attributes:
        to: the format, one of ``FORMATS``.
        path: the detector.
        runner: a Python file that runs it.
        stages: the same detector, which returns what led to the detections too, in a folder that goes away with this
            object; None where there is none.
    """

    to: str
    path: Path
    runner: Path
    stages: Path | None = None
    _folder: tempfile.TemporaryDirectory | None = None


def export_detector(predictor: Predictor, output: str | Path, to: str = "onnx") -> Exported:
    """Write a detector with its preprocessing and suppression inside, and beside it what runs it.

    What comes in and what goes out is at the head of :mod:`.graph`. Resizing is left to the caller.

    Args:
        predictor: out of ``fpn_d2.load(..., optimize=False)``; its model is not changed.
        output: folder to write to; made if it is not there.
        to: "onnx"; "pt2", a program of ``torch.export``; "aoti", the same compiled for this machine's processor by
            AOTInductor; or "openvino".

    Raises:
        UserError: a part of the detector cannot be exported, or what writes the format is not installed.

    Example:
        >>> predictor = fpn_d2.load("output/my/model_best.pth", optimize=False, device="cpu")
        >>> export_detector(predictor, "output/my/exported").path
    """
    if to not in FORMATS:
        raise UserError(f"the format is {to!r}; expected one of {', '.join(FORMATS)}")
    if predictor.cfg.INPUT.FORMAT not in ("BGR", "RGB"):
        raise UserError(f"INPUT.FORMAT is {predictor.cfg.INPUT.FORMAT}: only BGR and RGB can be exported")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        raise UserError(f"exporting needs PyTorch 2.7 or newer; this is {torch.__version__}")
    from .nms import nms_mask, nms_mask_as_one
    from .onnx_file import write_onnx
    from .openvino_file import read_for_openvino, write_openvino
    from .pt2_file import write_aoti, write_pt2

    folder = writable_folder(output)
    graph = graph_of(predictor.model, nms_mask_as_one if to in ("onnx", "openvino") else nms_mask)
    about = metadata(predictor) | {"outputs": list(graph.detections)}
    exported = Exported(to, folder / FORMATS[to], folder / f"{to}_runner.py")
    exported._folder = tempfile.TemporaryDirectory()
    scratch = Path(exported._folder.name)
    if to == "aoti":
        write_aoti(graph, exported.path, about)
    elif to == "pt2":
        exported.stages = scratch / "stages.pt2"
        write_pt2(graph, exported.path, about, exported.stages)
    elif to == "onnx":
        exported.stages = scratch / "stages.onnx"
        write_onnx(graph, exported.path, about, exported.stages)
    else:
        exported.stages = scratch / "stages.onnx"  # which OpenVINO reads as it reads that of the detector
        write_onnx(graph, scratch / "detector.onnx", about, exported.stages)
        write_openvino(read_for_openvino(scratch / "detector.onnx"), exported.path, about)
    _copy_runner(to, folder)
    return exported


def export_quantized(
    predictor: Predictor,
    output: str | Path,
    items: Sequence,
    inputs_of: Callable[[Any], dict],
    check_items: Sequence = (),
    validate: Callable[[Any, Sequence], float] | None = None,
    max_drop: float = 0.3,
) -> tuple[Exported, tuple[float | None, float | None], tuple[int, int]]:
    """Write a detector for OpenVINO with its convolutions and matrix products in 8-bit integers; see :mod:`.int8`.

    Args:
        predictor, output: see :func:`export_detector`.
        items, inputs_of: to calibrate with, see `int8.quantized`.
        check_items, validate, max_drop: see `int8.quantized_within`, which is called where all layers in int8 are too
            far off; without ``validate`` nothing is looked at.

    Returns:
        What was written; the figures of ``validate`` in float32 and in int8; how many layers stay in float32, and how
        many there are.

    Raises:
        UserError: see :func:`export_detector`; or NNCF is not installed.
    """
    from . import int8
    from .openvino_file import write_openvino

    folder = Path(output).expanduser()
    with tempfile.TemporaryDirectory() as scratch:
        exported = export_detector(predictor, scratch, "onnx")
        model = int8.read_to_quantise(exported.path)
        kept = int8.kept_in_float32(model)
        found, figures = int8.quantized(model, items, inputs_of, kept), (None, None)
        if validate is not None:
            import openvino

            core, options = openvino.Core(), {"INFERENCE_PRECISION_HINT": "f32"}

            def figure(one) -> float:
                return validate(core.compile_model(one, "CPU", options), check_items)

            figures = figure(model), figure(found)
            if not figures[0] - figures[1] <= max_drop:
                found = int8.quantized_within(model, items, inputs_of, kept, check_items, validate, max_drop)
                figures = figures[0], figure(found)
        folder.mkdir(parents=True, exist_ok=True)
        outputs = [one.any_name for one in model.outputs]
        path = folder / FORMATS["openvino"]
        write_openvino(found, path, metadata(predictor) | {"outputs": outputs})
        runner = _copy_runner("openvino", folder)
    return Exported("openvino", path, runner), figures, int8.layers_in_float32(found)


def _copy_runner(to: str, folder: Path) -> Path:
    """Put what runs a format into ``folder``."""
    for name in (f"{to}_runner.py", "runner_base.py", "runner_shapes.py"):
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    return folder / f"{to}_runner.py"


def metadata(predictor: Predictor) -> dict:
    """What whoever runs the file has to know, and where it comes from; kept inside the file."""
    cfg = predictor.cfg
    return {
        "classes": list(predictor.class_names),
        "category_ids": list(predictor.category_ids),
        "channels": cfg.INPUT.FORMAT,
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
        "short_side": cfg.INPUT.MIN_SIZE_TEST,
        "long_side": cfg.INPUT.MAX_SIZE_TEST,
    }
