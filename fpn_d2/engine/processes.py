"""Several processes on one machine: started together, and ended together when one of them fails.

The one that started them waits, hands signals on, and shows what went wrong: once, and of the process where it began.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path

from .loader import die_with_parent

_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
# Seconds that the other processes have to end when one has failed, and when they have been asked to stop: they may have
# to save a checkpoint.
_AFTER_FAILURE, _AFTER_STOP = 5.0, 120.0
# Seconds that a process of torchrun's waits for the first one to meet the same mistake; torchrun looks at least every
# 5 s whether one has ended.
_FOR_THE_FIRST = 12.0
# What a process says of its connection to one that is no more, in gloo and NCCL.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
# In a process that was started here: where it writes down its error.
_ERROR_FILE = "FPN_D2_ERROR_FILE"
_SAID = ""  # in that file: it has shown it itself


def run_processes(target: Callable, arguments: list[tuple], names: list[str], method: str = "spawn") -> None:
    """Run ``target(*arguments[i])`` in a process ``names[i]`` for each i; all are at their end when this returns.

    Args:
        target: Importable by its name, as are the arguments: the processes are spawned.
        arguments: One tuple for each process.
        names: For messages.
        method: How they are started, as in `multiprocessing`. Only spawned processes can use a GPU.

    Raises:
        SystemExit: One has failed, or they were stopped by a signal. Its status becomes that of the program.
    """
    context = multiprocessing.get_context(method)
    own_method = multiprocessing.get_start_method(allow_none=True)
    with tempfile.TemporaryDirectory(prefix="fpn_d2_") as folder:
        files = [Path(folder) / str(i) for i in range(len(names))]
        processes = [
            context.Process(target=_in_process, args=(target, given, str(file), own_method), name=name)
            for given, file, name in zip(arguments, files, names, strict=True)
        ]
        group = _Group(processes)
        with group.signals_handed_on():
            for process in processes:
                process.start()
            group.wait()
        errors = {name: file.read_text() for name, file in zip(names, files, strict=True) if file.exists()}
    group.exit(errors)


def say(line: str) -> None:
    """Print a mistake of the user: in the first process, or in the one that started this one if no other said it."""
    if _ERROR_FILE in os.environ and not multiprocessing.current_process().name.endswith(" 0"):
        Path(os.environ[_ERROR_FILE]).write_text(line)
        return
    if _ERROR_FILE in os.environ:
        Path(os.environ[_ERROR_FILE]).write_text(_SAID)
    if os.environ.get("RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(_FOR_THE_FIRST)  # torchrun ends this process when the first one has said the same, and ended
    print(line, file=sys.stderr, flush=True)


def lost_connection(error: BaseException) -> bool:
    """Whether an error says no more than that another process has ended."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)


def _in_process(target: Callable, arguments: tuple, error_file: str, start_method: str | None) -> None:
    os.environ[_ERROR_FILE] = error_file
    # A spawned process would spawn its loaders' workers too: seconds of imports, in which Ctrl-C gives tracebacks.
    multiprocessing.set_start_method(start_method, force=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        if getattr(signal.getsignal(number), "__func__", None) is _Group._hand_on:  # a forked process has it too
            signal.signal(number, signal.SIG_DFL)
    die_with_parent()
    try:
        target(*arguments)
    except KeyboardInterrupt as stop:
        sys.exit(128 + getattr(stop, "number", signal.SIGINT))
    except Exception as error:
        lost = "Lost the connection to another process, which has ended.\n" if lost_connection(error) else ""
        Path(error_file).write_text(lost or traceback.format_exc())
        sys.exit(1)


class _Group:
    """The processes, from their start to their end."""

    def __init__(self, processes: list[multiprocessing.Process]):
        self._processes = processes
        self._first: multiprocessing.Process | None = None  # that failed
        self._signal = 0
        self._deadline = float("inf")

    @contextlib.contextmanager
    def signals_handed_on(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hand_on(self, number: int, frame: object) -> None:
        self._signal = self._signal or number
        self._end_others(number, _AFTER_STOP)

    def _end_others(self, number: int, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)
        for process in self._processes:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def wait(self) -> None:
        while alive := [process for process in self._processes if process.is_alive()]:
            wait([process.sentinel for process in alive], timeout=0.5)
            failed = [process for process in self._processes if process.exitcode]
            if failed and self._first is None:
                # One that was killed from outside is the cause; the others only lost their connection to it.
                self._first = min(failed, key=lambda process: process.exitcode)
                stopped = self._first.exitcode in _STOPPED
                number = self._first.exitcode - 128 if stopped else signal.SIGTERM
                self._end_others(number, _AFTER_STOP if stopped else _AFTER_FAILURE)
            if time.monotonic() > self._deadline:
                self._deadline = float("inf")
                for process in self._processes:
                    process.kill()

    def exit(self, errors: dict[str, str]) -> None:
        """End the program as the processes did, with what the one that failed first has to say."""
        first = self._first
        if self._signal:
            if self._processes[0].exitcode < 0:  # in its start-up: it has said nothing
                print("Stopped. No checkpoint was saved.", file=sys.stderr, flush=True)
            sys.exit(128 + self._signal)
        if first is None:
            return
        if first.exitcode in _STOPPED:
            sys.exit(first.exitcode)
        if first.exitcode < 0:
            name = signal.Signals(-first.exitcode).name
            hint = ", which the system sends when memory runs out" if name == "SIGKILL" else ""
            print(f"error: {first.name} was ended by {name}{hint}; so all were ended", file=sys.stderr, flush=True)
            sys.exit(1)
        # A process that only lost its connection may be found dead before the one that it lost it to.
        told = sorted(errors.items(), key=lambda item: item[1].startswith("Lost"))
        if _SAID in errors.values():  # the same mistake, or what came of it
            told = [(name, text) for name, text in told if text and not text.startswith(("error: ", "Lost"))]
        if told:
            name, text = told[0]
            print(text.rstrip() if text.startswith("error: ") else f"error in {name}: {text.rstrip()}", file=sys.stderr)
        sys.exit(first.exitcode)
