"""The first model of a comparison, exported, in other engines: how far it is from itself there, and its times."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .. import parity
from ..engines.processes import time_in_processes
from ..engines.run import deploy, engine_tasks, model_task
from ..measure.timing import summarise
from ..subjects import Model, random_batch
from .accuracy import missing_data, real_images
from .measure import Size

_CALIBRATION_IMAGES = 100  # of DATASETS.TEST, for int8


class Engines:
    """A in its engines, beside both models.

    Attributes:
        outputs: by the name of the engine the differences from A, see `parity.summarise`.
        not_measured: what could not be done, in sentences.
    """

    def __init__(
        self, pair: Sequence[Model], names: Sequence[str], size: Size, number: int, data: bool, folder: Path
    ):
        """Export A and compare.

        Args:
            pair: A and B, on the CPU.
            names: of engines; none: nothing is done.
            size: (height, width) of the images to compare on.
            number: of those.
            data: take the images that int8 is calibrated on from DATASETS.TEST.
            folder: for the files.
        """
        self.pair, self.folder = pair, folder
        self.outputs: dict[str, dict] = {}
        self.not_measured: list[str] = []
        if names:
            calibration = self._calibration(data) if "openvino-int8" in names else []
            self.deployed = deploy(pair[0], names, self._images(size, number), folder, calibration)
            tolerances = self.deployed.tolerances
            for name, found in self.deployed.differences.items():
                self.outputs[name] = {**parity.summarise(found), "tolerance": vars(tolerances[name])}

    def _calibration(self, data: bool) -> list[torch.Tensor]:
        cfg = self.pair[0].cfg
        why_not = missing_data(cfg) if data else "not asked for (--data)"
        if why_not:
            self.not_measured.append(f"int8 with the ranges of real images, it has those of noise: {why_not}.")
            return []
        return [item["image"] for item in real_images(cfg, _CALIBRATION_IMAGES)]

    def _images(self, size: Size, number: int) -> list[torch.Tensor]:
        return [item["image"] for item in random_batch(self.pair[0].cfg, number, size)]

    def time(
        self,
        opts: dict[str, list[str]],
        dtype: str,
        size: Size,
        number: int,
        rounds: int,
        warmup: int,
        after_call: Callable[[], object],
    ) -> dict:
        """Time A, B and the engines in turn, each in a process of its own; see `measure.time_inference`.

        Args:
            opts: of the models, by label.
            dtype: of a model that is optimised for inference.
            size, number, rounds, warmup, after_call: see there.
        """
        tasks = {}
        for model in self.pair:
            optimize = dtype if model.runner is not model.network else ""
            tasks[model.label] = model_task(model, opts[model.label], optimize, size, number, self.folder)
        tasks |= engine_tasks(self.deployed, self._images(size, number), self.folder)
        samples, found = time_in_processes(tasks, rounds, warmup, self.folder, after_call)
        summary = summarise(samples)
        return {
            "size": list(size),
            "batch": number,
            **summary,
            "images_per_second": {name: number / one["median"] for name, one in summary["seconds"].items()},
            "detections_per_image": {name: count / number for name, count in found.items()},
        }
