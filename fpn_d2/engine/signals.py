"""Ctrl-C and SIGTERM: a training finishes its iteration, saves a checkpoint and stops.

A signal that comes while the program is being set up, or while a model is being evaluated, stops it there: nothing is
lost by it. One that comes in an iteration waits for its end, in all processes. A second one stops without a checkpoint,
and a third one ends the process where it stands.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from detectron2.utils import comm

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds in which one wish may arrive several times: from the terminal, and from the program that started this one.
_SAME_WISH = 1.0


class Stopped(KeyboardInterrupt):
    """The user, or the system, wants this program to end.

    Attributes:
        number: The signal's.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Signals:
    """What this process does on a signal: raises `Stopped`, or within `held_back` remembers it."""

    def __init__(self) -> None:
        self._first = 0  # the number of the first signal
        self._wishes = 0
        self._when = 0.0  # of the latest of them
        self._held_back = False
        self._saving = False
        self._installed = False
        self._group: dist.ProcessGroup | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals within this context; in another than the main thread, where that is impossible, don't."""
        if self._installed or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._first = self._wishes = 0
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        self._installed = True
        try:
            yield
        finally:
            self._installed = False
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def held_back(self, value: bool = True) -> Iterator[None]:
        """Within this context a first signal is only remembered; with False, and outside of it, it raises."""
        before, self._held_back = self._held_back, value
        try:
            if not value and self._first:
                raise Stopped(self._first)
            yield
        finally:
            self._held_back = before

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Within this context, which is to be short, a second signal changes nothing either; a third one does."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def agreed(self) -> int:
        """The signal that any of the processes has got, or 0. All processes call this together."""
        if comm.get_world_size() == 1:
            return self._first
        asked = torch.tensor([self._first])
        try:
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group_of_all())
        except RuntimeError:
            if not self._first:
                raise
            return self._first  # another process has stopped in the middle of an evaluation
        return int(asked)

    def _group_of_all(self) -> dist.ProcessGroup | None:
        if dist.get_backend() == "gloo":
            return None
        if self._group is None:
            self._group = dist.new_group(backend="gloo")  # a number on the CPU
        return self._group

    def _on_signal(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._wishes and now - self._when < _SAME_WISH:
            return
        self._wishes, self._when = self._wishes + 1, now
        if self._wishes == 1:
            self._first = number
            if not self._held_back:
                raise Stopped(number)
        elif self._wishes > 2:
            os._exit(128 + number)
        elif not self._saving:
            raise Stopped(number)


signals = Signals()
