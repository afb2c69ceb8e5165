"""The trainer: Detectron2's `DefaultTrainer` with our loader, precision, checkpoints and hooks."""

import contextlib
import io
import logging
import os
import sys
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
from detectron2.utils.events import EventWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fpn_d2.checkpoint.checkpointer import ReportingCheckpointer
from fpn_d2.checkpoint.contents import contents
from fpn_d2.data import TrainingMapper
from fpn_d2.errors import UserError
from fpn_d2.evaluation.evaluators import build_evaluator
from fpn_d2.modeling import without_timm_weights

from .averaging import WeightAveraging
from .bad_steps import BadSteps
from .bottom_up_rates import FrozenBottomUp
from .determinism import deterministic
from .device import on_this_machine
from .hooks import BestCheckpoint, TimedCheckpoint, ValidationLoss
from .loader import TrainingLoader
from .model_numbers import ModelNumbers
from .numbers import missing_maps_are_told
from .optimizer import build_optimizer, scale_learning_rate
from .precision import Watched, autocast, build_inner_trainer, precision_name
from .progress import ProgressBar, build_writers, has_terminal
from .randomness import ITERATION, seed_all, seed_of
from .registries import LR_SCHEDULER_REGISTRY, TRAIN_SAMPLER_REGISTRY
from .resume import load_inner, optimized_names, put_rates
from .signals import Stopped, signals
from .wandb_writer import WandbWriter, wandb_is_asked_for

logger = logging.getLogger(__name__)

# Hooks that do something after an iteration's checkpoint has been written, if it is due then.
_AFTER_CHECKPOINT = (hooks.EvalHook, ValidationLoss, BestCheckpoint)


class Trainer(DefaultTrainer):
    """Detectron2's `DefaultTrainer`, on GPUs and on CPUs.

    Beyond the inherited: several processes on CPUs, bfloat16, checkpoints that report what they loaded and hold the
    optimizer on every version of Detectron2, validation loss, best checkpoint, progress bar, test-time augmentation.
    """

    def __init__(self, cfg: CfgNode, *, from_checkpoint: bool = False):
        """Make everything that a training needs.

        Args:
            cfg: The configuration.
            from_checkpoint: `resume_or_load` will find a checkpoint to resume from: no weights of timm's are looked
                for, which this machine may not have.
        """
        # DefaultTrainer.__init__ has no seam for the wrapping of the model (it hands DistributedDataParallel a GPU),
        # for the inner trainer or for the checkpointer. So the same objects are made here, in the same order.
        TrainerBase.__init__(self)
        about = contents(cfg)
        cfg = on_this_machine(cfg)
        cfg = scale_learning_rate(self.auto_scale_workers(cfg, comm.get_world_size()))
        model = self.build_model(without_timm_weights(cfg) if from_checkpoint else cfg)
        optimizer = self.build_optimizer(cfg, model)
        # Detectron2's numbers are drawn by now; all processes agree on this one.
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        data_loader = self.build_train_loader(cfg)
        model = _distributed(model, find_unused_parameters=cfg.SOLVER.BOTTOM_UP_FROZEN_ITERS > 0)
        self._trainer = build_inner_trainer(cfg, model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = ReportingCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            partial_weights=cfg.MODEL.PARTIAL_WEIGHTS,
            about=about,
            keep=cfg.SOLVER.CHECKPOINT_KEEP,
            trainer=weakref.proxy(self),
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.results: dict = {}
        self._numbers = ModelNumbers(model)
        self._bad_steps = self._build_bad_steps()
        if isinstance(self._trainer, Watched):
            self._trainer.watch = self._bad_steps
        self.checkpointer.diverged = self._bad_steps.diverged
        self._averaging = WeightAveraging(model, cfg.SOLVER.EMA_DECAY) if cfg.SOLVER.EMA_DECAY else None
        if self._averaging:
            self.checkpointer.weights_to_save = self._averaging.applied
        self._hooks_due = False  # whether what comes after a checkpoint, as an evaluation, is still to be done
        self.register_hooks(self.build_hooks())
        for loader, _ in self._loaders():
            loader.seed = self.seed

    def build_hooks(self) -> list[hooks.HookBase]:
        """The inherited hooks, with ours before the writers so that what they measure is written."""
        cfg = self.cfg
        inherited = [
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate) if type(hook) is hooks.EvalHook else hook
            for hook in super().build_hooks()
        ]
        writers = [h for h in inherited if isinstance(h, hooks.PeriodicWriter)]
        ours = [ValidationLoss(cfg)] if cfg.TEST.VAL_LOSS_PERIOD > 0 else []
        if cfg.TEST.AUG.ENABLED:
            ours.append(hooks.EvalHook(0, self._test_with_augmentation))
        if comm.is_main_process():
            if cfg.TEST.BEST_METRIC and cfg.DATASETS.TEST and cfg.TEST.EVAL_PERIOD > 0:
                ours.append(BestCheckpoint(cfg.TEST.BEST_METRIC, cfg.TEST.EVAL_PERIOD, self.checkpointer))
            if has_terminal():
                ours.append(ProgressBar())
        first = [self._averaging] if self._averaging else []
        if cfg.SOLVER.BOTTOM_UP_FROZEN_ITERS:
            first.append(FrozenBottomUp(self.model, cfg.SOLVER.BOTTOM_UP_FROZEN_ITERS))
        built = first + [h for h in inherited if h not in writers] + ours + writers
        if comm.is_main_process() and cfg.SOLVER.CHECKPOINT_MINUTES > 0:
            periodic = next(k for k, h in enumerate(built) if isinstance(h, hooks.PeriodicCheckpointer))
            built.insert(periodic + 1, TimedCheckpoint(cfg.SOLVER.CHECKPOINT_MINUTES, self.checkpointer))
        return built

    def build_writers(self) -> list[EventWriter]:
        """The inherited writers, and Weights & Biases' where its variable asks for it."""
        return [*build_writers(super().build_writers()), *([WandbWriter(self.cfg)] if wandb_is_asked_for() else [])]

    def resume_or_load(self, resume: bool = True) -> None:
        """As inherited; with ``resume``, from the newest checkpoint that is not damaged."""
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.checkpointer.latest:
            self.start_iter = self.iter + 1

    def averaged(self) -> contextlib.AbstractContextManager:
        """The model has its averaged weights, inside, where SOLVER.EMA_DECAY asks for them."""
        return self._averaging.applied() if self._averaging else contextlib.nullcontext()

    def _evaluate(self) -> dict:
        with self.averaged():
            self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results

    def train(self) -> dict:
        """Train, evaluate, and check TEST.EXPECTED_RESULTS as Detectron2 does.

        Returns:
            The results of the last evaluation: {task: {metric: value}}, below the name of the data set where there
            are several. Empty in all processes but the first.
        """
        try:
            with signals.installed(), signals.held_back(), deterministic(self.cfg.SOLVER.DETERMINISTIC):
                super().train()
        finally:
            for loader, _ in self._loaders():
                loader.close()
        if self._averaging and self.iter >= self.max_iter:
            self._averaging.stay()
        self.results.update(getattr(self, "_last_eval_results", None) or {})
        return self.results

    def before_train(self) -> None:
        super().before_train()
        if self._hooks_due:  # it was stopped between a checkpoint and what comes after it, which is done now
            self.iter = self.storage.iter = self.start_iter - 1
            for hook in self._hooks:
                if isinstance(hook, _AFTER_CHECKPOINT):
                    hook.after_step()
            self.iter = self.storage.iter = self.start_iter

    def before_step(self) -> None:
        super().before_step()
        self._hooks_due = True
        self._bad_steps.before_step()
        seed_all(self._seed_of_step())

    def _seed_of_step(self) -> int:
        return seed_of(ITERATION, self.seed, self.iter, comm.get_rank())

    def _build_bad_steps(self) -> BadSteps:
        trainer = weakref.proxy(self)
        return BadSteps(
            self.model,
            self.cfg.OUTPUT_DIR,
            self.cfg.SOLVER.MAX_BAD_STEPS,
            config=self.cfg.dump(),
            where=lambda: (trainer.iter, trainer._seed_of_step()),
            rate=lambda: max(group["lr"] for group in trainer.optimizer.param_groups),
            batch=lambda: getattr(trainer.data_loader, "latest", []),
            numbers=lambda: trainer._numbers.state_dict(),
            context=lambda: autocast(trainer.cfg),
            scaled=hasattr(self._trainer, "grad_scaler"),
        )

    def after_step(self) -> None:
        try:
            super().after_step()
        except Stopped:
            self._save()
            raise
        self._hooks_due = False
        number = signals.agreed()
        if number:
            self._save()
            with contextlib.suppress(RuntimeError):  # one is gone already
                comm.synchronize()  # a process that ended before the file is written could end the others
            raise Stopped(number)

    def after_train(self) -> None:
        if sys.exc_info()[0] is not None:  # nothing is evaluated after an error or a signal
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, _AFTER_CHECKPOINT)]
        super().after_train()

    def _save(self) -> None:
        if comm.is_main_process():
            with signals.saving():
                self.checkpointer.save(f"model_{self.iter:07d}", iteration=self.iter)

    def state_dict(self) -> dict:
        state = super().state_dict()
        if "_trainer" not in state:  # v0.6 leaves the optimizer out of the checkpoint
            state["_trainer"] = self._trainer.state_dict()
        state["optimized"] = optimized_names(self.model, self.optimizer)
        state["precision"] = precision_name(self.cfg)
        state["seed"] = self.seed
        state["processes"] = comm.get_world_size()
        state["numbers"] = self._numbers.state_dict()
        state["hooks_due"] = self._hooks_due
        state["bad_steps"] = self._bad_steps.count
        loader = self._trainer.data_loader
        if isinstance(loader, TrainingLoader):
            state["data"] = loader.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        # The inner trainer's state is loaded here on every version; DefaultTrainer's own method, which the main
        # branch has, insists on it being there.
        rates = list(self.scheduler.base_lrs)
        TrainerBase.load_state_dict(self, state_dict)
        if "_trainer" in state_dict:
            self._trainer.iter = state_dict["_trainer"]["iteration"]
            load_inner(
                self._trainer,
                state_dict["_trainer"],
                state_dict.get("optimized"),
                state_dict.get("precision"),
                precision_name(self.cfg),
            )
            put_rates(self.scheduler, rates)
        else:
            logger.warning("The checkpoint holds no optimizer state (Detectron2 v0.6 saves none): momentum starts at 0")
        self._numbers.load_state_dict(state_dict.get("numbers", {}))
        self._hooks_due = state_dict.get("hooks_due", False)
        self._bad_steps.count = state_dict.get("bad_steps", 0)
        self._load_order(state_dict)

    def _load_order(self, state: dict) -> None:
        """Go on with the random numbers and the order of the images of a checkpoint."""
        if self.cfg.SEED not in (-1, state.get("seed", self.cfg.SEED)):
            logger.warning("SEED was %d and is %d: the order of the images is another", state["seed"], self.cfg.SEED)
        elif "seed" in state:
            self.seed = state["seed"]
        if state.get("processes", comm.get_world_size()) != comm.get_world_size():
            logger.warning(
                "The training had %d processes and has %d: it goes on with the same images in the same order, but the "
                "weights will not be the same to the last bit",
                state["processes"], comm.get_world_size(),
            )
        done = self.iter + 1
        for loader, batches in self._loaders(done):
            loader.seed = self.seed
            loader.skip(batches)
        loader = self._trainer.data_loader
        if not isinstance(loader, TrainingLoader):
            logger.warning("The images start in a new order: only the loader of fpn_d2 can go on where it was")
        elif "data" in state:
            loader.load_state_dict(state["data"])

    def _loaders(self, done: int = 0) -> list[tuple[TrainingLoader, int]]:
        """The loaders of the training and of PreciseBN, each with its number of batches in so many iterations."""
        loaders = [(self._trainer.data_loader, done)]
        for hook in self._hooks:
            if isinstance(hook, hooks.PreciseBN):
                loaders.append((hook._data_loader, done // hook._period * hook._num_iter if hook._period else 0))
        return [(loader, batches) for loader, batches in loaders if isinstance(loader, TrainingLoader)]

    def _test_with_augmentation(self) -> dict:
        with self.averaged():
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
        with contextlib.redirect_stdout(printed), signals.held_back(False):
            results = super().test(cfg, model, evaluators)
        if printed.getvalue():
            logging.getLogger("detectron2.evaluation").info("Printed by the evaluators:\n%s", printed.getvalue())
        return results

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        with missing_maps_are_told(cfg):
            return super().build_model(cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(
        cls, cfg: CfgNode, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        name = cfg.SOLVER.LR_SCHEDULER_NAME
        if name in LR_SCHEDULER_REGISTRY:
            return LR_SCHEDULER_REGISTRY.get(name)(cfg, optimizer)
        return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable:
        mapper = TrainingMapper(cfg, True)
        own = {"sampler": object()} if cfg.DATALOADER.SAMPLER_TRAIN in TRAIN_SAMPLER_REGISTRY else {}
        parts = build_detection_train_loader.from_config(cfg, mapper=mapper, **own)
        if not isinstance(parts["dataset"], list):  # a user's own, without records that can be counted
            if cfg.INPUT.MOSAIC or cfg.INPUT.COPY_PASTE:
                raise UserError(
                    "INPUT.MOSAIC and INPUT.COPY_PASTE draw from a list of records, which this data set is not: set "
                    "them to 0"
                )
            return build_detection_train_loader(cfg, mapper=mapper)
        return TrainingLoader(cfg, mapper, parts["dataset"], max(0, cfg.SEED))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        return build_detection_test_loader(cfg, dataset_name, mapper=TrainingMapper(cfg, False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name, output_folder)


def _distributed(model: nn.Module, **options) -> nn.Module:
    """Join ``model`` with its copies in the other processes, on GPUs as Detectron2 does it and on CPUs too."""
    if comm.get_world_size() > 1 and next(model.parameters()).device == torch.device("cpu"):
        return DistributedDataParallel(model, broadcast_buffers=False, **options)
    return create_ddp_model(model, broadcast_buffers=False, **options)
