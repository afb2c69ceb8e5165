"""How the processes of a training find each other: a wait that signals can end, and a store without old addresses."""

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

logger = logging.getLogger(__name__)

_TELL_AFTER = 15.0  # seconds
_POLL = 0.05


def wait_for_the_others(join: Callable[[], None], where: str) -> None:
    """Call ``join`` so that signals are answered meanwhile, and say so if it takes long.

    Where other processes are waited for in C++, which can be half an hour, Python does not see a signal. So that is
    done in another thread, and this one waits in Python.

    Args:
        join: Ends when all processes are there.
        where: The place, in words.
    """
    raised: list[BaseException] = []

    def work() -> None:
        try:
            join()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_TELL_AFTER)
    if thread.is_alive():
        logger.warning("Waiting for the other processes of this job (%s)", where)
    while thread.is_alive():
        thread.join(1.0)
    if raised:
        raise raised[0]


def store_of_torchrun(rank: int, processes: int, timeout: timedelta) -> dist.Store | None:
    """A store for the processes that torchrun has started now, in which nothing is of those that it started before.

    From torch 2.4 on torchrun has one store for all of its attempts. A process that finds an address in it which
    another one has left before a restart connects to nobody, and the restart fails. So the processes agree on a prefix
    of their own first.

    Args:
        rank: Of this process.
        processes: Of all machines together.
        timeout: For the others to come.

    Returns:
        The store, or None if this torchrun leaves it to the processes to make one.

    Raises:
        RuntimeError: The others have not come.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, False, timeout)
    return dist.PrefixStore(agree(store, rank, processes, timeout), store)


def agree(store: dist.Store, rank: int, processes: int, timeout: timedelta) -> str:
    """A name that only the processes know which are there now, though others have left their words in ``store``.

    The first process writes a new word. Each other one writes what it reads there beside a word of its own, until
    under that there is an answer; the first answers those alone that have its word.
    """
    own = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()

    def read(key: str) -> str:
        # Unlike `get` this waits for nothing: nobody writes "-", for which it would be exchanged.
        return store.compare_set(f"fpn_d2/{key}", "-", "-").decode()

    def until(found: Callable[[], bool]) -> None:
        while not found():
            if time.monotonic() > deadline:
                raise RuntimeError(f"not all of the {processes} processes of this job have come")
            time.sleep(_POLL)

    if rank == 0:
        store.set("fpn_d2/word", own)
        for other in range(1, processes):
            until(lambda other=other: read(f"heard/{other}").startswith(own))
            store.set(f"fpn_d2/answer/{read(f'heard/{other}').split()[1]}", own)
        return own

    def answered() -> bool:
        store.set(f"fpn_d2/heard/{rank}", f"{read('word')} {own}")
        return read(f"answer/{own}") != "-"

    until(answered)
    return read(f"answer/{own}")
