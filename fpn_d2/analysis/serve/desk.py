"""Work for one thread, and so much of it that waits: who comes later is told at once."""

import asyncio
import concurrent.futures
import contextlib
import math
import time
from collections.abc import Callable, Iterator


class Busy(Exception):
    """All places are taken; ``seconds`` says when it is worth to come again."""

    def __init__(self, seconds: int):
        super().__init__(f"all places are taken; come again in {seconds} s")
        self.seconds = seconds


class Late(Exception):
    """The time for an answer is over; what had begun is brought to its end, and thrown away."""


class Desk:
    """A bounded queue before one thread. All methods are for the event loop's own thread.

    Attributes:
        places: requests that are let in at once, from the first byte of their upload to their answer.
        taken: how many are in.
        seconds: that an answer takes, a running mean.
    """

    def __init__(self, places: int, timeout: float):
        """
        Args:
            places: see above.
            timeout: seconds that an answer may take, waiting included.
        """
        self.places = places
        self.taken = 0
        self.seconds = 1.0
        self._timeout = timeout
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "detector")

    def wait_hint(self) -> int:
        """Whole seconds until the requests that are in should be answered."""
        return max(1, math.ceil(self.taken * self.seconds))

    @contextlib.contextmanager
    def place(self) -> Iterator["Place"]:
        """Take a place, or raise `Busy`."""
        if self.taken >= self.places:
            raise Busy(self.wait_hint())
        place = Place(self)
        try:
            yield place
        finally:
            place.leave()

    def close(self) -> None:
        """Wait for what is being worked on; take nothing any more."""
        self._thread.shutdown(wait=True, cancel_futures=True)


class Place:
    """One request's place: kept until its work has ended, even where nobody waits for it any more."""

    def __init__(self, desk: Desk):
        self._desk = desk
        self._work: concurrent.futures.Future | None = None
        self._loop = asyncio.get_running_loop()
        desk.taken += 1

    def leave(self) -> None:
        if self._work is None or self._work.done():
            self._desk.taken -= 1
        else:
            self._work.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._free))

    def _free(self) -> None:
        self._desk.taken -= 1

    async def work(self, call: Callable[[], dict], gone: asyncio.Future) -> dict | None:
        """Have ``call`` done in the thread.

        Args:
            call: the work.
            gone: done as soon as the client has hung up; work that has not begun is then dropped.

        Returns:
            What ``call`` returns, or None if the client has gone.

        Raises:
            Late: it took too long.
        """
        self._work = self._desk._thread.submit(self._timed, call)
        answer = asyncio.wrap_future(self._work)
        await asyncio.wait({answer, gone}, timeout=self._desk._timeout, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            result, seconds = answer.result()
            self._desk.seconds += 0.2 * (seconds - self._desk.seconds)
            return result
        answer.add_done_callback(lambda one: one.cancelled() or one.exception())  # nobody asks for it any more
        self._work.cancel()
        if gone.done():
            return None
        raise Late

    @staticmethod
    def _timed(call: Callable[[], dict]) -> tuple[dict, float]:
        start = time.monotonic()
        return call(), time.monotonic() - start
