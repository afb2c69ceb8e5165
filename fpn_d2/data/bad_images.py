"""Images whose files have gone bad since they were checked: warned of, counted over all workers, up to a limit."""

import logging

import torch
from torch.utils.data import get_worker_info

from fpn_d2.errors import UserError, shown

logger = logging.getLogger(__name__)

_SLOTS = 256  # workers of one process that count by themselves; more share


class BadImage(ValueError):
    """Why an image cannot be used."""


class BadImages:
    """Those that one process and the workers of its loader have met.

    Each worker writes into a place of its own in memory that all of them share, so that nothing is lost and nothing is
    locked.
    """

    def __init__(self, limit: int):
        """
        Args:
            limit: How many images may be left out.
        """
        self._limit = limit
        self._counts = torch.zeros(_SLOTS, dtype=torch.int64).share_memory_()
        self._known: set[str] = set()

    def __len__(self) -> int:
        return int(self._counts.sum())

    def add(self, record: dict, why: BadImage) -> None:
        """Count an image that is left out, and warn of it the first time.

        Raises:
            UserError: There are more than the limit.
        """
        if record["file_name"] in self._known:
            return
        worker = get_worker_info()
        self._counts[0 if worker is None else 1 + worker.id % (_SLOTS - 1)] += 1
        if len(self) > self._limit:
            most = "" if not self._limit else f"; with it {len(self)} images are left out, and "
            raise UserError(
                f"{_words(record)}: {why}{most or '. '}DATASETS.MAX_BAD_IMAGES is {self._limit}: look after the disk, "
                "and go on with --resume"
            ) from why
        self.warn(record, f"{why}. It is left out, the {len(self)}. of at most {self._limit}")

    def warn(self, record: dict, text: str) -> None:
        """Say something about an image, once in each worker."""
        if record["file_name"] not in self._known:
            self._known.add(record["file_name"])
            logger.warning("%s: %s", _words(record), text)


def _words(record: dict) -> str:
    return f"Image {shown(record['file_name'], 300)} (image id {shown(record.get('image_id'))})"
