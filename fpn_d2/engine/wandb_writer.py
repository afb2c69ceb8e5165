"""What a training records, sent to Weights & Biases where somebody asks for it; Detectron2 has no such writer."""

import importlib.util
import os
from collections import defaultdict

import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

PROJECT = "WANDB_PROJECT"  # wandb's own variable: nothing is sent unless it is set


def wandb_is_asked_for() -> bool:
    """Whether the package is installed and its variable names a project."""
    return bool(os.environ.get(PROJECT)) and importlib.util.find_spec("wandb") is not None


class WandbWriter(EventWriter):
    """Logs scalars at their iterations. wandb's other variables hold too, as WANDB_MODE, WANDB_NAME, WANDB_RUN_ID."""

    def __init__(self, cfg: CfgNode, window: int = 20):
        """
        Args:
            cfg: kept with the run; wandb's own files go into OUTPUT_DIR.
            window: records of which noisy values are the median, as in ``metrics.json``.
        """
        import wandb

        config = yaml.safe_load(cfg.dump())
        self._run = wandb.init(project=os.environ[PROJECT], dir=cfg.OUTPUT_DIR, config=config, resume="allow")
        self._window = window
        self._written = -1

    def write(self) -> None:
        """Log what has been recorded since the last call."""
        steps: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(self._window).items():
            if iteration > self._written:
                steps[iteration][name] = value
        for iteration in sorted(steps):
            self._run.log(steps[iteration], step=iteration)
            self._written = iteration

    def close(self) -> None:
        self._run.finish()
