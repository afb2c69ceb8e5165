"""Weight files of every kind, in and out, read without running anything that they hold.

    .pth, .pt     what torch.save writes, in both of its formats
    .pkl          Detectron2's model zoo, and Detectron's and Caffe2's: NumPy arrays
    .pyth         pycls
    .safetensors  by the package of that name

The kind is told by the content. A `UserError` names the file and what it asked for.
"""

import contextlib
import os
import stat
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from fpn_d2.errors import UserError
from fpn_d2.files import UNFINISHED, writable_folder, writing

from .plain_pickle import Source, check_parts, load_plain
from .safetensors_file import is_safetensors, read_safetensors, write_safetensors
from .torch_file import LEGACY_MAGIC, PICKLE_NAMES, read_legacy, read_zip

_LONGEST_NAME = 1000


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read a weight file into the form that Detectron2's checkpointer works with.

    Args:
        path: A file on this machine.

    Returns:
        A dictionary with the tensors by name under "model", and what else the file holds. "matching_heuristics" is
        true, and "__author__" may be "Caffe2", where the names are not those of Detectron2.

    Raises:
        UserError: There is no such file, it is damaged, it holds no weights, or it asks for more than tensors, arrays,
            numbers, text and plain containers.
    """
    value, pickled = _read(path)
    if not isinstance(value, dict):
        raise UserError(f"{os.path.abspath(path)} holds a {type(value).__name__} and no dictionary of weights")
    if path.endswith(".pyth"):
        if not isinstance(value.get("model_state"), dict):
            raise UserError(f"{os.path.abspath(path)} has no 'model_state', which pycls writes into its .pyth files")
        model = {k: v for k, v in value["model_state"].items() if not str(k).endswith("num_batches_tracked")}
        checkpoint = {"model": model, "__author__": "pycls", "matching_heuristics": True}
    elif pickled and not ("model" in value and "__author__" in value):
        blobs = value.get("blobs", value)  # those of detectors have them, those of ImageNet have not
        blobs = blobs if isinstance(blobs, dict) else {}
        model = {k: v for k, v in blobs.items() if not _text(k).endswith("_momentum")}
        checkpoint = {"model": model, "__author__": "Caffe2", "matching_heuristics": True}
    else:
        checkpoint = value if "model" in value else {"model": value}
    if not isinstance(checkpoint["model"], dict) or not checkpoint["model"]:
        raise UserError(f"{os.path.abspath(path)} holds no weights: its 'model' is empty or no dictionary")
    try:
        return {**checkpoint, "model": _tensors(checkpoint["model"])}
    except UserError as error:
        raise UserError(f"{os.path.abspath(path)}: {error}") from None


def read_weights(path: str) -> Any:
    """Read a weight file as it is: what was saved, in plain containers.

    Raises:
        UserError: As `read_checkpoint`.
    """
    return _read(path)[0]


def _read(path: str) -> tuple[Any, bool]:
    """The content of a file, and whether it is a pickle that torch did not write."""
    shown = os.path.abspath(path)
    try:
        # Opening a pipe would wait for somebody to write into it.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError("it is no file with content")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > _memory():
                raise UserError(f"its {size / 2**30:.1f} GiB are more than the memory of this machine")
            start = file.read(9)
            file.seek(0)
            if start.startswith(b"PK\x03\x04"):
                return read_zip(file, size), False
            if is_safetensors(path, start, size):
                return read_safetensors(path), False
            source = Source(file, size)
            value = load_plain(source, PICKLE_NAMES)
            if isinstance(value, int) and value == LEGACY_MAGIC:
                return read_legacy(source), False
            check_parts(value)
            return value, True
    except UserError as error:
        raise UserError(
            f"{shown} is not read as weights: {error}. If you trust whoever wrote it, load it with their program and "
            "save the weights alone: torch.save(model.state_dict(), path)"
        ) from None
    except Exception as error:  # whatever bytes that are something else make zipfile, NumPy and torch say
        first = str(error).strip().splitlines()[:1]
        raise UserError(
            f"{shown} cannot be read as weights; it may be truncated or damaged, or of another kind "
            f"({type(error).__name__}: {_printable(first[0]) if first else 'no text'})"
        ) from error


def check_weight_file_name(path: str) -> None:
    """Raise a UserError unless ``path`` ends as a file does that `write_checkpoint` can write."""
    if not path.endswith((".pth", ".safetensors")):
        raise UserError(
            f"the file to write is {path}; expected a name that ends in .pth, as Detectron2 expects it, or .safetensors"
        )


def write_checkpoint(checkpoint: dict[str, Any], path: str) -> None:
    """Write the weights of a checkpoint as `read_checkpoint` returns it; the file appears whole or not at all.

    Args:
        checkpoint: "model", and how its names are to be understood; the rest is not written.
        path: Ends in .pth, for `torch.save`, or .safetensors.

    Raises:
        UserError: It has another ending or cannot be written, or the package safetensors is needed and not installed.
    """
    check_weight_file_name(path)
    writable_folder(os.path.dirname(path) or ".")
    kept = {key: checkpoint[key] for key in ("model", "__author__", "matching_heuristics") if key in checkpoint}
    unfinished = path + UNFINISHED
    try:
        if path.endswith(".safetensors"):
            write_safetensors(kept, unfinished)
        else:
            torch.save(kept, unfinished)
        with writing(path):
            os.replace(unfinished, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(unfinished)


def _memory() -> int:
    """Bytes of memory of this machine, or more than any file has where that cannot be told."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**63


def _tensors(model: dict) -> OrderedDict:
    """The same weights as tensors, with the versions of modules that torch keeps beside them."""
    tensors = OrderedDict()
    for name, value in model.items():
        name = _text(name)
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise UserError(f"{_printable(name)!r} is no name of a tensor: it is too long or holds control characters")
        if isinstance(value, np.ndarray | np.generic):
            if value.dtype.kind not in "biufc":
                raise UserError(f"{name} is an array of {value.dtype} and not of numbers")
            value = torch.from_numpy(np.array(value))
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{name} is a {type(value).__name__} and no tensor")
        tensors[name] = value
    metadata = getattr(model, "_metadata", None)
    if metadata:
        tensors._metadata = OrderedDict(
            (name, {"version": entry["version"]})
            for name, entry in metadata.items()
            if isinstance(name, str) and isinstance(entry, dict) and type(entry.get("version")) is int
        )
    return tensors


def _text(name: Any) -> str:
    return name.decode("latin1") if isinstance(name, bytes) else str(name)


def _printable(text: str, most: int = 100) -> str:
    shown = "".join(c if c.isprintable() else "?" for c in text[:most])
    return shown + ("..." if len(text) > most else "")
