"""What the terminal shows: a progress bar, and those log lines that a person wants to read."""

import logging
import os
import sys
import warnings
from typing import TextIO

from detectron2.engine import HookBase
from detectron2.utils.events import CommonMetricPrinter, EventStorage, EventWriter
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

# Lines with losses: a bar shows what they say.
_LOSSES = "detectron2.utils.events"
# What else of Detectron2 goes to the terminal; all of it goes to the log file.
_SHOWN = (_LOSSES, "detectron2.engine.train_loop", "detectron2.engine.hooks", "detectron2.evaluation.evaluator")


def has_terminal() -> bool:
    """Whether stderr, where the bar is drawn, is a terminal with rows and columns."""
    try:
        return min(os.get_terminal_size(sys.stderr.fileno())) > 0
    except OSError:
        return False


class ProgressBar(HookBase):
    """Progress bar with the losses (medians of 20 iterations), the learning rate and the time left, on stderr."""

    def __init__(self, file: TextIO | None = None):
        """
        Args:
            file: Where to draw; by default stderr.
        """
        self._file = file
        self._bar: tqdm | None = None

    def before_train(self) -> None:
        self._bar = tqdm(
            total=self.trainer.max_iter,
            initial=self.trainer.start_iter,
            unit="it",
            file=self._file or sys.stderr,
            bar_format="{l_bar}{bar:20}{r_bar}",
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def after_step(self) -> None:
        storage = self.trainer.storage
        latest = {name: value for name, (value, _) in storage.latest().items()}
        losses = {
            name.replace("loss_", ""): f"{history.median(20):.3g}"
            for name, history in storage.histories().items()
            if "loss" in name and not name.startswith("val_")
        }
        # The most wanted first: a narrow terminal cuts off the end.
        shown = {"loss": losses.pop("total_loss", "?")}
        if "val_total_loss" in latest:
            shown["val"] = f"{latest['val_total_loss']:.3g}"
        if "lr" in latest:
            shown["lr"] = f"{latest['lr']:.2g}"
        self._bar.set_postfix({**shown, **losses}, refresh=False)
        self._bar.update(1)
        if self.trainer.iter + 1 == self.trainer.max_iter:
            self._bar.close()  # before the evaluation's lines

    def after_train(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _MetricPrinter(CommonMetricPrinter):
    """Detectron2's, which divides by zero if it writes twice after one of the first iterations, as at an early end."""

    def _get_eta(self, storage: EventStorage) -> str | None:
        if self._last_write is not None and self._last_write[0] == storage.iter:
            return None
        return super()._get_eta(storage)


def build_writers(writers: list[EventWriter]) -> list[EventWriter]:
    """Detectron2's writers of a training's numbers, with the one for the terminal mended."""
    for writer in writers:
        if type(writer) is CommonMetricPrinter:
            writer.__class__ = _MetricPrinter
    return writers


def set_up_logging(output_dir: str, rank: int) -> None:
    """Send everything to ``log.txt`` in ``output_dir``, and to the terminal what fits there.

    On the terminal, Detectron2's environment, configuration, model and loader reports are left out, and its lines
    with losses too where there is a progress bar. Warnings are always shown.
    """
    logging.raiseExceptions = False  # a log that cannot be written, on a full disk, is not what ends a training
    warnings.filterwarnings("ignore", "torch.meshgrid", UserWarning)  # Detectron2's anchors; nothing to act on
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # Detectron2's default on few cores
    # The same calls as in Detectron2's default_setup: setup_logger remembers them and adds no second handler.
    libraries = [
        setup_logger(output_dir, distributed_rank=rank, name="fvcore"),
        setup_logger(output_dir, distributed_rank=rank),
    ]
    ours = setup_logger(output_dir, distributed_rank=rank, name="fpn_d2")
    for log in libraries:  # an evaluation calls it without the folder
        handlers = list(log.handlers)
        setup_logger(None, distributed_rank=rank, **({"name": "fvcore"} if log is libraries[0] else {}))
        log.handlers = handlers
    for log in [*libraries, ours]:
        for handler in log.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
                handler.setStream(_BesideTheBar(sys.stdout))
                handler.setLevel(logging.INFO)
                if log is not ours:
                    handler.addFilter(_fits_the_terminal)


def _fits_the_terminal(record: logging.LogRecord) -> bool:
    if record.levelno > logging.INFO:
        # Detectron2's loop logs an error that ends it; the end of the program shows it.
        return not (record.exc_info and record.msg == "Exception during training:")
    # A handler from before, somebody's own call of setup_logger, has shortened the name in the record itself.
    name = f"detectron2.{record.name[3:]}" if record.name.startswith("d2.") else record.name
    return name in _SHOWN and not (name == _LOSSES and has_terminal())


class _BesideTheBar:
    """A stream, with a bar that is being drawn moved out of the way of each line."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        with tqdm.external_write_mode(file=self._stream):
            self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()
