"""What runs an exported detector: each as a function of numpy arrays."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fpn_d2.errors import UserError

Engine = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]
# What runs the file of each format.
ENGINES = {"onnx": ("onnxruntime", "openvino"), "openvino": ("openvino",), "pt2": ("torch",), "aoti": ("inductor",)}


def open_engine(
    name: str, path: Path, names: tuple[str, ...] = (), threads: int = 0, dtype: str = "float32"
) -> Engine:
    """Open ``path`` on a CPU.

    Args:
        name: one of ``ENGINES``.
        path: of the file.
        names: of the outputs, for a file that does not hold them.
        threads: of the engine; 0: as it chooses.
        dtype: that OpenVINO computes in, "float32" or "bfloat16"; the others compute in that of the file.

    Returns:
        A function of images (N, 3, H, W) uint8 and their sizes (N, 2) int64 which returns the outputs by name.

    Raises:
        UserError: the engine is not installed.
    """
    try:
        if name == "openvino":
            return _openvino(path, threads, dtype)
        if name == "onnxruntime":
            return _onnxruntime(path, threads)
        return _torch(path, names, compiled=name == "inductor")
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'fpn_d2[export]'") from None


def _onnxruntime(path: Path, threads: int) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]

    def run(images: np.ndarray, image_sizes: np.ndarray) -> dict[str, np.ndarray]:
        found = session.run(outputs, {"images": images, "image_sizes": image_sizes})
        return dict(zip(outputs, found, strict=True))

    return run


def _openvino(path: Path, threads: int, dtype: str) -> Engine:
    import openvino

    options: dict = {"INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype]}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    return engine_of_compiled(openvino.Core().compile_model(os.fspath(path), "CPU", options))


def engine_of_compiled(compiled) -> Engine:
    """What a model that OpenVINO has compiled gives, see :func:`open_engine`."""
    outputs = [output.any_name for output in compiled.outputs]

    def run(images: np.ndarray, image_sizes: np.ndarray) -> dict[str, np.ndarray]:
        found = compiled({"images": images, "image_sizes": image_sizes})
        return {name: np.array(found[i]) for i, name in enumerate(outputs)}

    return run


def _torch(path: Path, names: tuple[str, ...], compiled: bool) -> Engine:
    import torch
    import torchvision  # noqa: F401  (registers what the file uses)

    module = torch._inductor.aoti_load_package(os.fspath(path)) if compiled else torch.export.load(path).module()

    @torch.no_grad()
    def run(images: np.ndarray, image_sizes: np.ndarray) -> dict[str, np.ndarray]:
        found = module(torch.from_numpy(images), torch.from_numpy(image_sizes))
        return {name: value.numpy() for name, value in zip(names, found, strict=True)}

    return run
