"""The checkpoints of a training in their folder: written whole or not at all, checked, found again, pruned.

A ``.pth`` file is a zip archive in which `torch.save` keeps a checksum (CRC-32) of every tensor and of the rest.
PyTorch itself does not look at them; `read_checkpoint` does.
"""

import contextlib
import logging
import os
import re
from typing import IO, Any

import torch

from fpn_d2.errors import UserError, shown
from fpn_d2.files import UNFINISHED, sync_folder

from .reading import read_checkpoint

logger = logging.getLogger(__name__)

LAST = "last_checkpoint"  # the file that names the newest checkpoint, as in Detectron2
_PERIODIC = re.compile(r"model_(\d{7,})\.pth")
_OURS = re.compile(r"model_(\d{7,}|last|final|best)\.pth")


def write_checkpoint(data: dict[str, Any], path: str, before: str = "") -> None:
    """Write ``data`` to ``path`` by `torch.save`: when this returns it is on the disk, before that nothing is there.

    Args:
        data: What `torch.save` takes.
        path: A file; what it holds is replaced.
        before: The checkpoint before this one, for the message.

    Raises:
        UserError: It cannot be written. Nothing half-written is left.
    """
    unfinished = path + UNFINISHED
    watched = None
    try:
        with open(unfinished, "wb") as file:
            watched = _Watched(file)
            torch.save(data, watched)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(os.path.dirname(path))
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(unfinished)
        # torch.save says something else about a full disk.
        cause = watched.error if watched and watched.error else error
        if not isinstance(cause, OSError):
            raise
        intact = f"; {before} is as it was, and --resume goes on from it" if before else ""
        raise UserError(f"cannot save {path}: {cause.strerror or cause}{intact}") from error


class _Watched:
    """A file that remembers the error that it met."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def remove_unfinished(folder: str) -> None:
    """Remove what a process that was killed while it wrote a checkpoint has left in ``folder``."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if entry.name.endswith(f".pth{UNFINISHED}"):
                os.remove(entry.path)


def damage(path: str) -> str:
    """Why a checkpoint cannot be read, or "" if every byte that counts is as it was written."""
    try:
        read_checkpoint(path)
    except UserError as error:
        return str(error)
    return ""


def has_checkpoint(folder: str) -> bool:
    """Whether there is one to go on from, sound or not."""
    return os.path.isfile(_named(folder)) or bool(_all(folder, _OURS))


def newest_good(folder: str) -> str:
    """The checkpoint to go on from: the one that ``last_checkpoint`` names, or else the newest whose file is sound.

    Returns:
        Its path, or "" if ``folder`` has none.

    Raises:
        UserError: There are some, and all are damaged.
    """
    named = _named(folder)
    others = [path for path in _all(folder, _OURS) if path != named]
    damaged = []
    for path in ([named] if named else []) + sorted(others, key=os.path.getmtime, reverse=True):
        there = os.path.exists(path)
        problem = damage(path) if there else f"{folder} has no {shown(os.path.basename(path))}, which {LAST} names"
        if not problem:
            if path != named:
                logger.warning("%s: going on from %s", damaged[0] if damaged else f"{folder} has no {LAST}", path)
            return path
        damaged.append(problem)
    if damaged and (named and os.path.exists(named) or others):
        raise UserError(
            f"no checkpoint in {folder} can be used: {damaged[0]}; start without --resume, or put a good file there"
        )
    return ""


def prune(folder: str, keep: int, newest: str) -> None:
    """Delete all but the ``keep`` newest periodic checkpoints up to ``newest``; those called final or best stay."""
    last = _PERIODIC.fullmatch(os.path.basename(newest))
    if keep <= 0 or not last:
        return
    number = {path: int(_PERIODIC.fullmatch(os.path.basename(path))[1]) for path in _all(folder, _PERIODIC)}
    older = sorted((path for path in number if number[path] <= int(last[1])), key=number.get)
    for path in older[:-keep]:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def _named(folder: str) -> str:
    try:
        with open(os.path.join(folder, LAST)) as file:
            name = file.read(4096).strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return os.path.join(folder, name) if name and name == os.path.basename(name) else ""


def _all(folder: str, pattern: re.Pattern) -> list[str]:
    try:
        return [entry.path for entry in os.scandir(folder) if pattern.fullmatch(entry.name) and entry.is_file()]
    except OSError:
        return []
