"""An operation in C++: declared in one place, built, tried and switched on or off like all others."""

import ctypes
import functools
import logging
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fpn_d2.errors import UserError

from . import build

logger = logging.getLogger(__name__)

VARIABLE = "FPN_D2_NATIVE"
NAMES = ("roi_align", "winograd", "depthwise", "group_norm", "nms", "enlarge")
_FOLDER = Path(__file__).parent  # of the sources
_lock = threading.Lock()  # while an operation is loaded
_trying = threading.local()


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # a thread that held it is not in the child
    os.register_at_fork(after_in_child=_new_lock)


def problem(integers: str, pointers: str, doubles: str = "") -> type[ctypes.Structure]:
    """Make the ctypes twin of a C++ ``struct Problem``: its int64s, then doubles, then pointers, by name."""
    kinds = ((integers, ctypes.c_int64), (doubles, ctypes.c_double), (pointers, ctypes.c_void_p))
    fields = [(name, kind) for names, kind in kinds for name in names.split()]
    return type("Problem", (ctypes.Structure,), {"_fields_": fields})


@dataclass(eq=False)
class Op:
    """An operation that runs in C++ where it can.

    The environment variable ``FPN_D2_NATIVE`` says which may: "on" (the default), "off", or those that may not, by name
    with commas. Whatever stands in the way, there is one line in the log, and the operation runs as it does without.

    Args:
        name: for the variable and the profiler.
        source: file in this folder.
        flags: of the compiler, beside those of all.
        does: what it does, for the log: "Pooling".
        otherwise: how that is done where it does not run, for the log: "in pure torch".
        problem: the one argument of its functions, see :func:`problem`.
        functions: take a pointer to a problem and return a number below zero where memory or threads ran out.
        questions: take and return an int64.
        trial: looks whether a small case gives what a plain reference does, through the operation's own functions.
            Returns why it must not run, or "".
    """

    name: str
    source: str
    flags: tuple[str, ...]
    does: str
    otherwise: str
    problem: type[ctypes.Structure]
    functions: tuple[str, ...]
    trial: Callable[[], str]
    questions: tuple[str, ...] = ()
    _loaded: ctypes.CDLL | None = field(default=None, init=False)
    _decided: bool = field(default=False, init=False)

    def library(self) -> ctypes.CDLL | None:
        """Return the library, loaded at the first call; None where it does not run. A failure is not tried again.

        Raises:
            UserError: ``FPN_D2_NATIVE`` names no operation.
        """
        if self.name in _left_out(os.environ.get(VARIABLE, "on")):
            return None
        if not self._decided and getattr(_trying, "op", None) is not self:
            with _lock:
                if not self._decided:
                    self._loaded = self._load()
                    self._decided = True
        return self._loaded

    def forget(self) -> None:
        """Load it anew at the next call."""
        self._loaded, self._decided = None, False

    def _load(self) -> ctypes.CDLL | None:
        try:
            symbols = (*self.functions, *self.questions)
            self._loaded, where = build.load(_FOLDER / self.source, self.flags, symbols)
            for name in symbols:
                kind = ctypes.POINTER(self.problem) if name in self.functions else ctypes.c_int64
                getattr(self._loaded, name).argtypes = [kind]
                getattr(self._loaded, name).restype = ctypes.c_int64
            if hasattr(self._loaded, "use_openmp") and (start := _openmp()):  # cpu_kernels.h has it
                self._loaded.use_openmp(start)
            why = self._tried()
        except (OSError, ValueError, AttributeError, RuntimeError) as error:
            why = build.first_line(error)
        if why:
            logger.warning(f"{self.does} runs {self.otherwise}, not compiled: {why}")
            return None
        logger.info(f"{self.does} runs compiled: {where}")
        return self._loaded

    def _tried(self) -> str:
        """Run the trial in a thread of its own: without autocast, traces and whatever else is on in this one."""
        found = []

        def run() -> None:
            _trying.op = self
            try:
                found.append(self.trial())
            except Exception as error:  # whatever it is, the operation does not do what it should
                found.append(f"a trial of it failed ({type(error).__name__}: {build.first_line(error)})")

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return found[0]

    def ask(self, question: str, value: int = 0) -> int:
        """Call one of its questions; 0 where it does not run."""
        library = self.library()
        return getattr(library, question)(value) if library else 0

    def run(self, function: str, **values) -> int:
        """Call one of its functions, where :meth:`library` is there. A profiler sees it by name.

        Args:
            function: its name.
            values: fields of the problem: numbers; tensors and arrays, whose memory it gets; tuples and lists of whole
                numbers, of floats or of tensors; None.

        Returns:
            What the function returned.

        Raises:
            MemoryError: there was too little memory, or there were no threads to be had.
        """
        pointers = {name: _pointer(value) for name, value in values.items()}  # their arrays live until the end
        arguments = self.problem(**{name: getattr(value, "at", value) for name, value in pointers.items()})
        call = getattr(self.library(), function)
        if torch.autograd._profiler_enabled():
            with torch.autograd.profiler.record_function(f"fpn_d2::{function}"):
                result = call(ctypes.byref(arguments))
        else:
            result = call(ctypes.byref(arguments))
        if result < 0:
            raise MemoryError(f"{self.does}, compiled ({function}), ran out of memory or threads")
        return result


@dataclass
class _Array:
    at: int
    of: ctypes.Array


def _pointer(value: object) -> object:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, np.ndarray):
        return value.ctypes.data
    if not isinstance(value, (tuple, list)):
        return value
    numbers = [_pointer(one) for one in value]
    kind = ctypes.c_double if isinstance(numbers[0], float) else ctypes.c_int64
    array = (kind * len(numbers))(*numbers)
    return _Array(ctypes.addressof(array), array)


@functools.lru_cache(maxsize=8)
def _left_out(value: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in value.split(","))
    if value in ("", "on", "off"):
        return NAMES if value == "off" else ()
    if not set(words) <= set(NAMES):
        raise UserError(f"{VARIABLE} is {value!r}; expected on, off, or some of {', '.join(NAMES)}, with commas")
    return words


@functools.lru_cache(maxsize=1)
def _openmp() -> ctypes.c_void_p | None:
    """Return the address of what starts a parallel region in the OpenMP runtime that torch has loaded, or None.

    The functions run in as many threads as ``torch.get_num_threads()`` says, those of torch's own runtime where it can
    be found: a second runtime, or threads beside it, would compete with it for the processor's cores.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    loaded = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    runtimes = {path for path in loaded if re.search(r"/lib(gomp|iomp5|omp)\b[^/]*\.so", path)}
    of_torch = {path for path in runtimes if Path(torch.__file__).parent in Path(path).parents}
    if len(found := of_torch or runtimes) != 1:  # none, or several of which torch may use any
        return None
    try:
        return ctypes.cast(ctypes.CDLL(found.pop()).GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None
