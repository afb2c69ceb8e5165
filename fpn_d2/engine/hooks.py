"""Hooks of the trainer: validation loss, best checkpoint."""

import contextlib
import copy
import json
import logging
import math
import os
import time

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.data.detection_utils import build_augmentation
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fpn_d2.checkpoint.checkpointer import BEST_MODEL, ReportingCheckpointer
from fpn_d2.data import TrainingMapper
from fpn_d2.errors import UserError
from fpn_d2.files import write_atomically

from .precision import autocast
from .randomness import random_states_put_back, seed_all
from .signals import signals

logger = logging.getLogger(__name__)


class ValidationLoss(HookBase):
    """Every TEST.VAL_LOSS_PERIOD iterations, the mean losses over the images of DATASETS.TEST.

    They are the losses of training, on images prepared as for testing, with the same random choices (which anchors
    and proposals are sampled) for an image each time, so that the curve shows the model's change alone. They are
    logged as ``val_total_loss``, ``val_loss_cls``, ... Training goes on as if nothing had been computed: the forward
    passes run in a copy of the model, and the random states are put back.
    """

    def __init__(self, cfg: CfgNode):
        """
        Raises:
            UserError: A test set has no annotations.
        """
        self._cfg = cfg
        for name in cfg.DATASETS.TEST:
            if not any(r.get("annotations") or "sem_seg_file_name" in r for r in DatasetCatalog.get(name)):
                raise UserError(f"TEST.VAL_LOSS_PERIOD needs annotations, but data set {name} has none: set it to 0")

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._cfg.TEST.VAL_LOSS_PERIOD == 0 or done == self.trainer.max_iter:
            with signals.held_back(False), self.trainer.averaged():
                losses = validation_losses(self._cfg, self.trainer.model)
            if comm.is_main_process():
                self.trainer.storage.put_scalars(
                    smoothing_hint=False, **{f"val_{name}": value for name, value in losses.items()}
                )
                logger.info("Validation loss after %d iterations: %.4f", done, losses["total_loss"])


def validation_losses(cfg: CfgNode, model: nn.Module) -> dict[str, float]:
    """Mean over the images of DATASETS.TEST of each training loss, and their sum as ``total_loss``.

    Every image is seen by itself and with random choices of its own, so that the mean does not depend on how many
    processes share the images.

    Args:
        cfg: The configuration.
        model: The model, or its distributed wrapper; neither it nor any random state changes.

    Returns:
        The means by name; empty in all processes but the first.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)):
            module.eval()
    # exact: images as they are evaluated on, not as they are trained on
    mapper = TrainingMapper(cfg, True, augmentations=build_augmentation(cfg, False), recompute_boxes=False, exact=True)
    attributes = dict(vars(model))
    sums: dict[str, float] = {}
    count = 0
    # Losses also write to the event storage; a scratch one takes that. Iteration 1 is no multiple of a VIS_PERIOD.
    with random_states_put_back(), torch.no_grad(), EventStorage(1):
        for name in cfg.DATASETS.TEST:
            loader = build_detection_test_loader(cfg, name, mapper=mapper)
            # The sampler gives the indices of this process's images in the data set; each batch is one image.
            for index, image in zip(loader.batch_sampler.sampler, loader, strict=True):
                seed_all(index)
                with autocast(cfg):
                    losses = model(image)
                for key, value in losses.items():
                    sums[key] = sums.get(key, 0.0) + float(value)
                count += 1
                # RetinaNet divides its losses by a running mean, an attribute that each image moves.
                vars(model).clear()
                vars(model).update(attributes)
    gathered = comm.gather((sums, count))
    if not comm.is_main_process():
        return {}
    images = max(1, sum(n for _, n in gathered))
    keys = {key: None for part, _ in gathered for key in part}
    mean = {key: sum(part.get(key, 0.0) for part, _ in gathered) / images for key in keys}
    return {"total_loss": sum(mean.values()), **mean}


class TimedCheckpoint(HookBase):
    """Saves ``model_last.pth`` whenever no checkpoint has been saved for some minutes, so that a kill loses no more."""

    def __init__(self, minutes: float, checkpointer: ReportingCheckpointer):
        self._seconds = minutes * 60
        self._checkpointer = checkpointer

    def after_step(self) -> None:
        if time.monotonic() - self._checkpointer.saved_at > self._seconds:
            self._checkpointer.save("model_last", iteration=self.trainer.iter)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter and self._checkpointer.latest.endswith("model_final.pth"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(self._checkpointer.save_dir, "model_last.pth"))


class BestCheckpoint(HookBase):
    """Keeps the checkpoint with the highest value so far of a metric, as ``model_best.pth``.

    Detectron2's own hook forgets the best value when a training is resumed. This one keeps it in every checkpoint, and
    for people in ``model_best.json``. It goes after the hook that evaluates.
    """

    def __init__(self, metric: str, period: int, checkpointer: ReportingCheckpointer):
        """
        Args:
            metric: Name in the event storage, as "bbox/AP".
            period: Iterations between two evaluations; 0: only the one at the end.
            checkpointer: Saves the model.
        """
        self._metric = metric
        self._period = period
        self._checkpointer = checkpointer
        self._record = os.path.join(checkpointer.save_dir, f"{BEST_MODEL}.json")
        self._best = -math.inf

    def state_dict(self) -> dict:
        return {"metric": self._metric, "value": self._best}

    def load_state_dict(self, state: dict) -> None:
        if state["metric"] == self._metric:
            self._best = state["value"]

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._consider(done)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._consider(self.trainer.max_iter)

    def _consider(self, done: int) -> None:
        latest = self.trainer.storage.latest()
        if self._metric not in latest:
            measured = sorted(k for k in latest if "/AP" in k or "/AR" in k or "/PQ" in k or "/mIoU" in k)
            logger.warning(
                "TEST.BEST_METRIC %s was not measured, so %s.pth is not kept; there are: %s",
                self._metric, BEST_MODEL, ", ".join(measured[:12]) or "none",
            )
            return
        value, _ = latest[self._metric]
        if not math.isfinite(value) or value <= self._best:
            return
        self._best = value
        self._checkpointer.save(BEST_MODEL, iteration=done - 1)
        write_atomically(self._record, json.dumps({"metric": self._metric, "value": value, "iterations": done}))
        logger.info("Best so far: %s %.2f after %d iterations, kept as %s.pth", self._metric, value, done, BEST_MODEL)
