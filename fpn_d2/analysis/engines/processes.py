"""Detectors that are timed in turn, each in a process of its own, of which one works at a time.

In one process the threads that an engine leaves spinning take the cores from the next one. A process that is not asked
sleeps.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fpn_d2.engine import UserError

from ..measure.child import child_environment
from ..measure.timing import paired

WORKER = "fpn_d2.analysis.engines.worker"
# Threads that wait for more work spin for some milliseconds before they sleep.
_REST = 0.1


def time_in_processes(
    tasks: Mapping[str, dict],
    rounds: int,
    warmup: int,
    folder: Path,
    after_call: Callable[[], object] | None = None,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Time detectors in turn.

    Args:
        tasks: by name what a process does, see `worker.detector_of`.
        rounds: measured rounds of A B A B.
        warmup: rounds before them.
        folder: for what the processes say, NAME.log.
        after_call: called behind each call.

    Returns:
        Seconds of each round, by name; and how many detections an image has, by name.

    Raises:
        UserError: one of them could not start, or ended.
    """
    with contextlib.ExitStack() as stack:
        # One after the other: each warms its caches while the others are not there or asleep.
        started = {name: stack.enter_context(_process(name, task, folder)) for name, task in tasks.items()}
        calls = {name: process.call for name, process in started.items()}
        samples = paired(calls, rounds, warmup, measure=lambda call: call(), after_call=after_call)
        return samples, {name: process.detections for name, process in started.items()}


class _Process:
    """A process that runs its detector once for every line that it is sent."""

    def __init__(self, name: str, child: subprocess.Popen, log: Path):
        self._name, self._child, self._log = name, child, log
        self.detections = self._read()["detections"]

    def call(self) -> float:
        """Seconds of one call, by the clock of the process."""
        time.sleep(_REST)
        self._child.stdin.write("call\n")
        self._child.stdin.flush()
        return self._read()["seconds"]

    def _read(self) -> dict:
        line = self._child.stdout.readline()
        if not line:
            status = self._child.wait()
            last = (self._log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"the process of {self._name} ended with {status}: {last}")
        return json.loads(line)


@contextlib.contextmanager
def _process(name: str, task: dict, folder: Path) -> Iterator[_Process]:
    log = folder / f"{name.replace(' ', '_').replace(',', '')}.log"
    with open(log, "w") as messages:
        child = subprocess.Popen(
            [sys.executable, "-m", WORKER, json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
            env=child_environment(),
        )
        try:
            yield _Process(name, child, log)
        finally:
            child.kill()
            child.wait()
            child.stdin.close()
            child.stdout.close()
