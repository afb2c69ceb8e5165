"""The images of a training in their order: the same again from any iteration, for any number of processes and workers.

Detectron2's sampler gives an endless sequence of images. Here it is cut into batches of SOLVER.IMS_PER_BATCH for all
processes together, of images that are all upright or all lying where DATALOADER.ASPECT_RATIO_GROUPING is on; each
process takes its share of each batch. An image's place in the sequence seeds its augmentation. So a batch is the same
for one process as for eight, and a position in the sequence is all that a checkpoint has to hold.
"""

import ctypes
import itertools
import logging
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from fpn_d2.data import TrainingMapper

from .randomness import IMAGE, ORDER, random_states_put_back, seed_all, seed_of
from .registries import TRAIN_SAMPLER_REGISTRY

logger = logging.getLogger(__name__)

Place = tuple[int, int]  # of an image in the sequence: (index in the data set, position)
# A worker that was asked to end, and was not told to by its loader, is given this long, in seconds.
_PATIENCE = 30
_TRIES = 1000


class TrainingLoader:
    """Endless batches for training: lists of what the mapper makes of a record, this process's share of each.

    Its workers start with the first batch, so that `load_state_dict` can still say where.
    """

    def __init__(self, cfg: CfgNode, mapper: Callable[[dict], dict | None], records: list[dict], seed: int):
        """
        Args:
            cfg: Names the sampler, the batch size, the grouping and the number of workers.
            mapper: Makes the model's input of a record; None: the image is of no use, and another one takes its place.
            records: Detectron2's dictionaries, of the data sets of DATASETS.TRAIN.
            seed: Of the order and of the augmentation; the same in all processes.
        """
        self._cfg = cfg
        self._mapper = mapper
        self._records: list[dict] | None = records  # gone with the first batch: their objects would fill the memory
        self._sampler: Sampler | None = None
        self._data = DatasetFromList(records, copy=False)
        if isinstance(mapper, TrainingMapper):
            mapper.others = self._data
        self._groups = _groups(records) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else np.zeros(len(records), np.uint8)
        self._state = _State(0, [[], []])  # after the batches handed out so far
        self._ahead: deque[_State] = deque()  # after each batch that the workers know and the training does not yet
        self._running: Generator[list[dict], None, None] | None = None
        self.seed = seed
        self.latest: list[dict] = []  # the batch that was handed out last

    def __iter__(self) -> Iterator[list[dict]]:
        self._running = self._read()
        return self._running

    def close(self) -> None:
        """End the workers."""
        if self._running is not None:
            self._running.close()

    def _read(self) -> Generator[list[dict], None, None]:
        self._ahead.clear()
        if self._sampler is None:
            self._sampler, self._records = self._build_sampler(), None
        loader = DataLoader(
            _Seeded(self._data, self._mapper, self.seed),
            batch_sampler=_Batches(self._shares),
            num_workers=self._cfg.DATALOADER.NUM_WORKERS,
            collate_fn=trivial_batch_collator,
            worker_init_fn=_set_up_worker,
            generator=torch.Generator().manual_seed(0),  # else its start takes a number of the training's own
        )
        batches = iter(loader)
        try:
            for batch in batches:
                self._state = self._ahead.popleft()
                self.latest = batch
                yield batch
        finally:
            # Else they live for as long as anything, as an error's traceback, knows the iterator.
            getattr(batches, "_shutdown_workers", lambda: None)()

    def state_dict(self) -> dict:
        """Where the training stands, the same in all processes."""
        waiting = [[list(place) for place in group] for group in self._state.waiting]
        return {"images": len(self._data), "position": self._state.position, "waiting": waiting}

    def load_state_dict(self, state: dict) -> None:
        """Go on from there. Data of another length has another order, which starts at its beginning."""
        if state["images"] != len(self._data):
            logger.warning("The data had %d images and has %d: its order starts anew", state["images"], len(self._data))
            return
        waiting = [[(index, position) for index, position in group] for group in state["waiting"]]
        self._state = _State(state["position"], waiting)

    def skip(self, batches: int) -> None:
        """Go on as after so many batches, for checkpoints that do not say where they stand."""
        self._state = _State(batches * self._cfg.SOLVER.IMS_PER_BATCH, [[], []])

    def _shares(self) -> Iterator[list[Place]]:
        """This process's share of each batch from ``self._state`` on."""
        rank, processes = comm.get_rank(), comm.get_world_size()
        size = self._cfg.SOLVER.IMS_PER_BATCH
        position, waiting = self._state.position, [list(group) for group in self._state.waiting]
        # Detectron2's samplers: __iter__ is one process's part.
        every = getattr(self._sampler, "_infinite_indices", self._sampler.__iter__)
        order = itertools.islice(every(), position, None)
        while True:
            while not any(len(group) >= size for group in waiting):
                index = int(next(order))
                waiting[self._groups[index]].append((index, position))
                position += 1
            full = next(k for k, group in enumerate(waiting) if len(group) >= size)
            batch, waiting[full] = waiting[full][:size], waiting[full][size:]
            self._ahead.append(_State(position, [list(group) for group in waiting]))
            yield batch[rank::processes]

    def _build_sampler(self) -> Sampler:
        cfg = self._cfg.clone()
        cfg.defrost()
        cfg.SEED = seed_of(ORDER, self.seed) % 2**31  # Detectron2's main branch reads it; v0.6 draws one
        with random_states_put_back():
            seed_all(cfg.SEED)
            if cfg.DATALOADER.SAMPLER_TRAIN in TRAIN_SAMPLER_REGISTRY:
                return TRAIN_SAMPLER_REGISTRY.get(cfg.DATALOADER.SAMPLER_TRAIN)(cfg, self._records)
            return build_detection_train_loader.from_config(cfg, mapper=self._mapper, dataset=self._records)["sampler"]


def _groups(records: list[dict]) -> np.ndarray:
    """For each image 0 if it is wider than high, else 1, as Detectron2 groups them."""
    return np.array([not r.get("width", 0) > r.get("height", 0) for r in records], np.uint8)


class _State:
    def __init__(self, position: int, waiting: list[list[Place]]):
        self.position = position  # in the sequence
        self.waiting = waiting  # images before it that no batch has yet, by group


class _Batches(Sampler):
    def __init__(self, batches: Callable[[], Iterator[list[Place]]]):
        self._batches = batches

    def __iter__(self) -> Iterator[list[Place]]:
        return self._batches()


class _Seeded(Dataset):
    """Maps the record at a place, with random numbers that depend on the place alone."""

    def __init__(self, records: Dataset, mapper: Callable[[dict], dict | None], seed: int):
        self._records = records
        self._mapper = mapper
        self._seed = seed

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, place: Place) -> dict:
        index, position = place
        with random_states_put_back(gpus=False):
            for attempt in range(_TRIES):
                seed = seed_of(IMAGE, self._seed, position, attempt)
                if attempt:
                    index = seed % len(self._records)
                seed_all(seed)
                mapped = self._mapper(self._records[index])
                if mapped is not None:
                    return mapped
        raise RuntimeError(f"None of {_TRIES} images in a row could be used")


def _set_up_worker(number: int) -> None:
    """Workers end with the training and not before it: a signal to all processes is the training's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The loader itself ends a worker that hangs by SIGTERM, which then comes true later.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_PATIENCE))
    die_with_parent()


def die_with_parent() -> None:
    """Have Linux end this process when the one that started it ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
