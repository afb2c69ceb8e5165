"""What a check has found, for the processes that this one starts: they take it over instead of checking once more."""

import atexit
import contextlib
import hashlib
import json
import multiprocessing
import os
import tempfile
from typing import Any

from fpn_d2.files import UNFINISHED

# Names a file; handed on with the environment.
_VARIABLE = "FPN_D2_CHECKED"
# The file that this process has made, and its number: a forked process inherits the first.
_own: tuple[str, int] | None = None


def recall(name: str, state: tuple) -> dict | None:
    """What was found of the data set ``name`` in the same state by the process that has started this one, if any."""
    parent = multiprocessing.parent_process()
    with contextlib.suppress(KeyError, TypeError):
        found = _read(os.environ[_VARIABLE])[name]
        if parent is not None and found["process"] == parent.pid and found["state"] == _digest(state):
            return found["what"]
    return None


def remember(name: str, state: tuple, what: Any) -> None:
    """Keep ``what`` was found, which json can hold, for `recall`. Not to be able to costs another check, no more.

    Each process has a file of its own, which begins with what it was handed: programs that one process has started with
    its environment would write into each other's.
    """
    with contextlib.suppress(OSError):
        path = os.environ.get(_VARIABLE)
        every = _read(path) if path is not None else {}
        every[name] = {"process": os.getpid(), "state": _digest(state), "what": what}
        if _own != (path, os.getpid()):
            path = _make_own()
        unfinished = f"{path}{UNFINISHED}"
        with open(unfinished, "w", encoding="utf-8") as file:
            json.dump(every, file)
        os.replace(unfinished, path)


def _read(path: str) -> dict:
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        found = json.load(file)
        return found if isinstance(found, dict) else {}
    return {}


def _make_own() -> str:
    global _own
    handle, path = tempfile.mkstemp(prefix="fpn_d2_", suffix=".json")
    os.close(handle)
    os.environ[_VARIABLE] = path
    _own = path, os.getpid()
    atexit.register(_forget, path, os.getpid())
    return path


def _forget(path: str, owner: int) -> None:
    if os.getpid() == owner:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _digest(state: tuple) -> str:
    return hashlib.sha256(repr(state).encode(errors="backslashreplace")).hexdigest()
