"""A detector in the engines that people deploy it with: exported, compared with the model, timed beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fpn_d2.engine import UserError
from fpn_d2.inference import Predictor
from fpn_d2.inference.export import Exported, export_detector
from fpn_d2.inference.export.engines import open_engine

from .. import parity
from ..exported import TOLERANCE, eager_stages, stages_of
from ..subjects import Model, number_of_classes, random_batch

# By its name: what runs the file, and in which data type.
ENGINES = {
    "onnxruntime": ("onnxruntime", "float32"),
    "openvino": ("openvino", "float32"),
    "openvino-bfloat16": ("openvino", "bfloat16"),
    "openvino-int8": ("openvino", "int8"),
}
# What lower precision may make of the maps of the pyramid, by their largest value.
LOWER = {"bfloat16": 0.05, "int8": 0.3}
_CALIBRATION_IMAGES = 4


@dataclass
class Deployed:
    """A model as its engines have it.

    Attributes:
        files: what each engine runs, by its name.
        differences: from the model, by the name of the engine; in lower precision those of the pyramid alone.
        tolerances: that they were compared with, by the name of the engine.
    """

    files: dict[str, Path]
    differences: dict[str, list[parity.Difference]]
    tolerances: dict[str, parity.Tolerance]


def deploy(
    model: Model, engines: Sequence[str], images: Sequence[Tensor], folder: Path, calibration: Sequence[Tensor] = ()
) -> Deployed:
    """Export a model, and compare each engine with it.

    Args:
        model: on the CPU; its ``network`` is exported.
        engines: names of ``ENGINES``.
        images: (3, H, W) uint8 to compare on, at the network's size.
        folder: for the files.
        calibration: images for int8; none: noise, which gives its speed and not its AP.

    Raises:
        UserError: an engine is not installed, or the model cannot be exported.
    """
    predictor = Predictor(model.network, model.cfg)
    exported = export_detector(predictor, folder / "exported", "onnx")
    found = Deployed({}, {}, {})
    eager = eager_stages(model.network, images)
    for name in engines:
        engine, dtype = ENGINES[name]
        found.files[name], stages = exported.path, exported.stages
        if dtype == "int8":
            noise = [item["image"] for item in random_batch(model.cfg, _CALIBRATION_IMAGES, images[0].shape[1:])]
            found.files[name], stages = _int8_files(exported, calibration or noise, folder)
        run = open_engine(engine, stages, threads=torch.get_num_threads(), dtype=_computed(dtype))
        theirs = stages_of(run, images)
        if dtype in LOWER:  # which of many almost equal scores are the highest is another draw there
            theirs = {"pyramid": theirs["pyramid"]}
        found.tolerances[name] = replace(TOLERANCE, relative=LOWER.get(dtype, TOLERANCE.relative))
        own = {stage: eager[stage] for stage in theirs}
        found.differences[name] = parity.compare(own, theirs, found.tolerances[name])
    return found


def _computed(dtype: str) -> str:
    return "float32" if dtype == "int8" else dtype  # what is not quantised


def _int8_files(exported: Exported, images: Sequence[Tensor], folder: Path) -> tuple[Path, Path]:
    """The detector in int8, and the same which returns its stages too."""
    from fpn_d2.inference.export import int8
    from fpn_d2.inference.export.openvino_file import write_openvino

    def inputs_of(image: Tensor) -> dict[str, np.ndarray]:
        return {"images": image[None].numpy(), "image_sizes": np.array([image.shape[1:]], np.int64)}

    paths = []
    for name, source in (("int8", exported.path), ("int8_stages", exported.stages)):
        model = int8.read_to_quantise(source)
        paths.append(folder / f"{name}.xml")
        found = int8.quantized(model, list(images), inputs_of, int8.kept_in_float32(model))
        write_openvino(found, paths[-1], {})
    return paths[0], paths[1]


def engine_tasks(deployed: Deployed, images: Sequence[Tensor], folder: Path, name: str = "images") -> dict[str, dict]:
    """What `processes.time_in_processes` is told of each engine, to run it on a batch of images of one size."""
    sizes = {tuple(image.shape[1:]) for image in images}
    if len(sizes) != 1:
        raise ValueError(f"images of {len(sizes)} sizes; expected one size")
    path = folder / f"{name}.npz"
    np.savez(path, images=torch.stack(list(images)).numpy(), image_sizes=np.array([*sizes] * len(images), np.int64))
    common = {"threads": torch.get_num_threads(), "images": str(path)}
    return {
        name: common | {"engine": ENGINES[name][0], "dtype": _computed(ENGINES[name][1]), "path": str(file)}
        for name, file in deployed.files.items()
    }


def model_task(model: Model, opts: Sequence[str], optimize: str, size: Sequence[int], batch: int, folder: Path) -> dict:
    """The same of a model, whose weights are written to ``folder``."""
    state = folder / f"{model.label}.pth"
    if not state.exists():
        torch.save(model.network.state_dict(), state)
    return {
        "threads": torch.get_num_threads(),
        "config": model.path,
        "opts": [*opts, *number_of_classes(model.cfg)],
        "state": str(state),
        "optimize": optimize,
        "size": list(size),
        "batch": batch,
    }


def check_names(engines: Sequence[str]) -> None:
    """Refuse names of engines that there are not.

    Raises:
        UserError: one is not in ``ENGINES``.
    """
    for name in engines:
        if name not in ENGINES:
            raise UserError(f"there is no engine {name!r}; expected one of {', '.join(ENGINES)}")
