"""Training and evaluation: the trainer, its configuration, its checkpoints, and the processes that it runs in."""

from fpn_d2.checkpoint.checkpointer import ReportingCheckpointer
from fpn_d2.errors import UserError, user_mistakes_end_the_program
from fpn_d2.evaluation.evaluators import build_evaluator
from fpn_d2.evaluation.pictures import draw_detections
from fpn_d2.evaluation.results import results_table
from fpn_d2.huge_pages import ask_for_huge_pages

from .launch import check_address, launch
from .prepare import load_config, load_prepared, prepare_data
from .registries import LR_SCHEDULER_REGISTRY, TRAIN_SAMPLER_REGISTRY
from .run import run
from .trainer import Trainer

__all__ = [
    "LR_SCHEDULER_REGISTRY",
    "TRAIN_SAMPLER_REGISTRY",
    "ReportingCheckpointer",
    "Trainer",
    "UserError",
    "ask_for_huge_pages",
    "build_evaluator",
    "check_address",
    "draw_detections",
    "launch",
    "load_config",
    "load_prepared",
    "prepare_data",
    "results_table",
    "run",
    "user_mistakes_end_the_program",
]
