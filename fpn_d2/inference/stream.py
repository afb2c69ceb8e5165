"""A stream of images through a predictor: decoding in threads, batches of one size, results in order, memory flat."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread

import numpy as np
from detectron2.structures import Instances

from fpn_d2.errors import UserError

from .predictor import Predictor, Prepared
from .sources import Item

# Images that wait for others of their size before a batch is run: this many batches, or this many bytes.
_WAITING_BATCHES = 4
_WAITING_BYTES = 256 * 2**20


@dataclass
class Result:
    """What became of one image.

    Attributes:
        item: which.
        instances: what was found in it, in its pixels; None if there is an error.
        pixels: the image, (H, W, C) in the channel order ``INPUT.FORMAT``; None if there is an error.
        error: why there are none.
    """

    item: Item
    instances: Instances | None = None
    pixels: np.ndarray | None = None
    error: str | None = None


def detect(predictor: Predictor, items: Iterable[Item], workers: int = 2) -> Iterator[Result]:
    """Detect objects in a stream of images, which may be endless.

    Args:
        predictor: the detector.
        items: the images; an error in one is a result like any other.
        workers: threads that decode and resize images while the model runs; 0: the thread that runs the model does.

    Yields:
        A `Result` for each item, in their order.
    """
    window: list[tuple[Item, Prepared | str]] = []
    size = 0
    for item, prepared in _prepared(predictor, items, workers):
        window.append((item, prepared))
        size += prepared.nbytes if isinstance(prepared, Prepared) else 0
        full = len(window) >= _WAITING_BATCHES * predictor.batch_size or size > _WAITING_BYTES
        # A batch of one waits for nothing, nor does a camera.
        if full or predictor.batch_size == 1 or (item.video is not None and item.video.live):
            yield from _results(predictor, window)
            window, size = [], 0
    yield from _results(predictor, window)


def _results(predictor: Predictor, window: list[tuple[Item, Prepared | str]]) -> Iterator[Result]:
    found = iter(predictor.detect([prepared for _, prepared in window if isinstance(prepared, Prepared)]))
    for item, prepared in window:
        if isinstance(prepared, Prepared):
            yield Result(item, next(found), prepared.pixels)
        else:
            yield Result(item, error=prepared)


def _prepared(predictor: Predictor, items: Iterable[Item], workers: int) -> Iterator[tuple[Item, Prepared | str]]:
    if workers == 0:
        for item in items:
            yield item, _prepare(predictor, item)
        return
    ahead = 2 * workers + predictor.batch_size
    waiting: deque[tuple[Item, Future]] = deque()
    with ThreadPoolExecutor(workers, "decode") as pool:
        try:
            for item in _in_background(items, ahead):
                waiting.append((item, pool.submit(_prepare, predictor, item)))
                while len(waiting) > ahead or (waiting and item.video is not None and item.video.live):
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _prepare(predictor: Predictor, item: Item) -> Prepared | str:
    """The image for the network, or in a sentence why there is none."""
    if item.error is not None:
        return item.error
    try:
        return predictor.prepare(item.image, channels="BGR")
    except UserError as error:
        return str(error)
    except MemoryError:
        return "too large for the memory of this machine"


def _in_background(items: Iterable[Item], ahead: int) -> Iterator[Item]:
    """The same items, asked for in a thread: where they are frames, the video is decoded while the model runs."""
    queue: Queue = Queue(ahead)
    end, stop = object(), Event()

    def put(value: object) -> None:
        while not stop.is_set():
            try:
                return queue.put(value, timeout=0.1)
            except Full:
                continue

    def fill() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    return
            put(end)
        except BaseException as error:  # belongs to who reads the queue
            put(error)

    thread = Thread(target=fill, name="sources", daemon=True)
    thread.start()
    try:
        while (value := queue.get()) is not end:
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        stop.set()
        while True:  # lets a thread that waits for room see it
            try:
                queue.get_nowait()
            except Empty:
                break
        thread.join()
