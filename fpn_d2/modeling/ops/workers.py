"""Threads of Python's that share work out among them, while each of PyTorch's operations stays within its thread."""

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Item = TypeVar("Item")


def share(work: Callable[[Iterable[Item]], None], items: Sequence[Item], threads: int) -> None:
    """Call ``work(some of the items)`` in each of so many threads, without gradients, until all are worked on.

    Args:
        work: takes one item after the other; who is ready first takes the next one.
        items: in the order in which they are taken.
        threads: number of threads; 1 for the caller's own, whose operations use as many threads as PyTorch does.

    Raises:
        Exception: what ``work`` raised. By then all threads have ended their work.
    """
    threads = min(threads, len(items))
    if threads <= 1:
        return work(items)
    left, inference = deque(items), torch.is_inference_mode_enabled()

    def taken() -> Iterator[Item]:
        while True:
            try:
                yield left.popleft()
            except IndexError:
                return

    def within() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(taken())

    futures = [_pool(threads).submit(within) for _ in range(threads)]
    try:
        for future in futures:
            future.result()
    finally:  # where one failed, or the user interrupts, the others stop soon
        left.clear()
        wait(futures)


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "fpn_d2", initializer=_use_one_thread)


if hasattr(os, "register_at_fork"):  # a forked process has no threads but the one that forked
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _use_one_thread() -> None:
    """Have PyTorch's operations use this thread alone, when they are called from it."""
    everywhere = torch.get_num_threads()  # first: the first question also sets this thread's number, to that of all
    torch.set_num_threads(1)
    # That was the number of this thread and what new threads begin with; the latter goes back to what it was.
    restoring = threading.Thread(target=torch.set_num_threads, args=(everywhere,))
    restoring.start()
    restoring.join()
