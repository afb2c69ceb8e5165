"""Training and evaluation: the trainer, its configuration, its checkpoints, and the processes that it runs in."""

from .checkpoint import ReportingCheckpointer
from .config_loading import load_config
from .errors import UserError, user_mistakes_end_the_program
from .evaluators import build_evaluator
from .launch import ask_for_huge_pages, check_address, launch
from .pictures import draw_detections
from .results import results_table
from .run import run
from .trainer import Trainer

__all__ = [
    "ReportingCheckpointer",
    "Trainer",
    "UserError",
    "ask_for_huge_pages",
    "build_evaluator",
    "check_address",
    "draw_detections",
    "launch",
    "load_config",
    "results_table",
    "run",
    "user_mistakes_end_the_program",
]
