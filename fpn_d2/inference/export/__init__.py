"""A trained detector as one file that runs without Detectron2 and without this package."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from fpn_d2.errors import UserError

from ..predictor import Predictor
from .graph import DetectorGraph, graph_of

FORMATS = ("onnx", "pt2")
__all__ = ["FORMATS", "DetectorGraph", "Exported", "export_detector", "graph_of"]


@dataclass
class Exported:
    """What was written.

    Attributes:
        path: the detector.
        runner: a Python file that runs it.
        stages: the same detector, which returns what led to the detections too, in a folder that goes away with this
            object; None where there is none.
    """

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
        to: "onnx" or "pt2".

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
    from .pt2_file import write_pt2

    graph = graph_of(predictor.model, nms_mask_as_one if to == "onnx" else nms_mask)
    folder = Path(output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    exported = Exported(folder / f"detector.{to}", folder / f"{to}_runner.py")
    if to == "onnx":
        exported._folder = tempfile.TemporaryDirectory()
        exported.stages = Path(exported._folder.name) / "stages.onnx"
        write_onnx(graph, exported.path, metadata(predictor), exported.stages)
    else:
        write_pt2(graph, exported.path, metadata(predictor))
    shutil.copyfile(Path(__file__).with_name(f"{to}_runner.py"), exported.runner)
    return exported


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
