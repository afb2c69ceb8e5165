"""Files of the safetensors format, in and out: tensors and a little text, and nothing that could be run.

The package ``safetensors`` checks names, sizes and offsets itself. It is needed only where such a file is.
"""

import importlib
from typing import Any

from torch import Tensor

from fpn_d2.errors import UserError


def is_safetensors(path: str, start: bytes, size: int) -> bool:
    """Whether a file is of this format, by its name or else its first 9 bytes: the header's length and its brace."""
    return path.endswith(".safetensors") or (start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8)


def read_safetensors(path: str) -> dict[str, Any]:
    """Read the tensors of a file, by name, under "model", and what `write_safetensors` put beside them.

    Raises:
        UserError: The package is not installed.
    """
    _require()
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        notes = file.metadata() or {}
        checkpoint: dict[str, Any] = {"model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
    if notes.get("__author__"):
        checkpoint["__author__"] = notes["__author__"]
    if notes.get("matching_heuristics") == "True":
        checkpoint["matching_heuristics"] = True
    return checkpoint


def write_safetensors(checkpoint: dict[str, Any], path: str) -> None:
    """Write the tensors under "model" of a checkpoint, and how their names are to be understood.

    Raises:
        UserError: The package is not installed.
    """
    _require()
    from safetensors.torch import save_file

    # The format has no views: tensors that share memory become copies.
    weights: dict[str, Tensor] = {name: value.clone().contiguous() for name, value in checkpoint["model"].items()}
    notes = {key: str(checkpoint[key]) for key in ("__author__", "matching_heuristics") if checkpoint.get(key)}
    save_file(weights, path, metadata={"format": "pt", **notes})


def _require() -> None:
    try:
        importlib.import_module("safetensors")
    except ModuleNotFoundError as error:
        if error.name != "safetensors":
            raise
        raise UserError("files of this kind need the package safetensors: pip install safetensors") from None
