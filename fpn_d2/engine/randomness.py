"""Random numbers as a function of where a training stands, so that nothing has to be remembered to repeat them.

Every iteration of every process and every image starts from a seed of its own, made from the seed of the training and
from where it stands. A training that goes on from a checkpoint draws the same numbers as one that was never stopped,
whatever drew numbers in between: an evaluation, a worker that had read ahead, another number of workers.
"""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

# First of the numbers that make a seed: what is drawn for one purpose says nothing about another.
ITERATION, IMAGE, ORDER = range(3)


def seed_of(*where: int) -> int:
    """A seed of 63 bits for ``where``, integers >= 0, by NumPy's `SeedSequence`, which mixes all their bits."""
    return int(np.random.SeedSequence(where).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_all(seed: int) -> None:
    """Seed every random number generator that training uses; those of all GPUs too."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def random_states_put_back(gpus: bool = True) -> Iterator[None]:
    """At the end, put back the states of all that `seed_all` seeds; those of GPUs only if ``gpus``."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(list(range(torch.cuda.device_count())) if gpus else []):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
