"""The trainer: Detectron2's `DefaultTrainer` with our loader, precision, checkpoints and hooks."""

import contextlib
import io
import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fpn_d2.checkpoint.checkpointer import ReportingCheckpointer
from fpn_d2.checkpoint.contents import contents
from fpn_d2.data import TrainingMapper
from fpn_d2.evaluation.evaluators import build_evaluator

from .hooks import BestCheckpoint, StopOnInterrupt, ValidationLoss
from .optimizer import build_optimizer
from .precision import build_inner_trainer
from .progress import ProgressBar, has_terminal

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Detectron2's `DefaultTrainer`, on GPUs and on CPUs.

    Beyond the inherited: several processes on CPUs, bfloat16, checkpoints that report what they loaded and hold the
    optimizer on every version of Detectron2, validation loss, best checkpoint, progress bar, test-time augmentation.
    """

    def __init__(self, cfg: CfgNode):
        # DefaultTrainer.__init__ has no seam for the wrapping of the model (it hands DistributedDataParallel a GPU),
        # for the inner trainer or for the checkpointer. So the same objects are made here, in the same order.
        TrainerBase.__init__(self)
        about = contents(cfg)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = _distributed(model)
        self._trainer = build_inner_trainer(cfg, model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = ReportingCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            partial_weights=cfg.MODEL.PARTIAL_WEIGHTS,
            about=about,
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.results: dict = {}
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[hooks.HookBase]:
        """The inherited hooks, with ours before the writers so that what they measure is written."""
        cfg = self.cfg
        inherited = super().build_hooks()
        writers = [h for h in inherited if isinstance(h, hooks.PeriodicWriter)]
        ours = [ValidationLoss(cfg)] if cfg.TEST.VAL_LOSS_PERIOD > 0 else []
        if cfg.TEST.AUG.ENABLED:
            ours.append(hooks.EvalHook(0, self._test_with_augmentation))
        if comm.is_main_process():
            if cfg.TEST.BEST_METRIC and cfg.DATASETS.TEST:
                ours.append(BestCheckpoint(cfg.TEST.BEST_METRIC, cfg.TEST.EVAL_PERIOD, self.checkpointer))
            if comm.get_world_size() == 1:
                ours.append(StopOnInterrupt(self.checkpointer))
            if has_terminal():
                ours.append(ProgressBar())
        return [h for h in inherited if h not in writers] + ours + writers

    def train(self) -> dict:
        """Train, evaluate, and check TEST.EXPECTED_RESULTS as Detectron2 does.

        Returns:
            The results of the last evaluation: {task: {metric: value}}, below the name of the data set where there
            are several. Empty in all processes but the first.
        """
        super().train()
        self.results.update(getattr(self, "_last_eval_results", None) or {})
        return self.results

    def state_dict(self) -> dict:
        state = super().state_dict()
        if "_trainer" not in state:  # v0.6 leaves the optimizer out of the checkpoint
            state["_trainer"] = self._trainer.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        # The inner trainer's state is loaded here on every version; DefaultTrainer's own method, which the main
        # branch has, insists on it being there.
        TrainerBase.load_state_dict(self, state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        else:
            logger.warning("The checkpoint holds no optimizer state (Detectron2 v0.6 saves none): momentum starts at 0")

    def _test_with_augmentation(self) -> dict:
        results = self.test_with_TTA(self.cfg, self.model)
        self.results.update(results)
        return results

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """Evaluate with test-time augmentation (TEST.AUG); the results' names end in ``_TTA``."""
        logger.info("Inference with test-time augmentation")
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict((f"{name}_TTA", value) for name, value in results.items())

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None) -> dict:
        """Evaluate as `DefaultTrainer.test` does; what pycocotools prints goes to the log file."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            results = super().test(cfg, model, evaluators)
        if printed.getvalue():
            logging.getLogger("detectron2.evaluation").info("Printed by the evaluators:\n%s", printed.getvalue())
        return results

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable:
        return build_detection_train_loader(cfg, mapper=TrainingMapper(cfg, True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        return build_detection_test_loader(cfg, dataset_name, mapper=TrainingMapper(cfg, False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name, output_folder)


def _distributed(model: nn.Module) -> nn.Module:
    """Join ``model`` with its copies in the other processes, on GPUs as Detectron2 does it and on CPUs too."""
    if comm.get_world_size() > 1 and next(model.parameters()).device == torch.device("cpu"):
        return DistributedDataParallel(model, broadcast_buffers=False)
    return create_ddp_model(model, broadcast_buffers=False)
