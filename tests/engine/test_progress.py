"""The bar and what else the terminal shows."""

import fcntl
import io
import logging
import pty
import struct
import termios

import pytest
from detectron2.utils.logger import setup_logger

from fpn_d2.engine import Trainer, progress
from fpn_d2.engine import trainer as trainer_module
from fpn_d2.engine.progress import ProgressBar, has_terminal, set_up_logging

from .small import small_config


def test_the_bar_shows_losses_learning_rate_and_time_left(tmp_path, scenes):
    cfg = small_config(tmp_path, scenes, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 3)
    trainer = Trainer(cfg)
    screen = io.StringIO()
    trainer.register_hooks([ProgressBar(screen)])
    trainer.train()
    assert "val=" not in screen.getvalue()
    last = screen.getvalue().split("\r")[-1]
    assert "3/3" in last
    assert "<00:00" in last
    for name in ("loss=", "cls=", "rpn_loc=", "lr=0.01"):
        assert name in last


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_there_on_a_terminal_only(tmp_path, scenes, monkeypatch, terminal):
    monkeypatch.setattr(trainer_module, "has_terminal", lambda: terminal)
    trainer = Trainer(small_config(tmp_path, scenes, "DATASETS.TEST", "()"))
    assert any(isinstance(hook, ProgressBar) for hook in trainer._hooks) == terminal


@pytest.mark.parametrize(("rows", "columns", "shown"), [(24, 80, True), (24, 0, False), (0, 80, False)])
def test_a_terminal_is_one_with_room(monkeypatch, rows, columns, shown):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with open(theirs, "w") as screen, open(ours):
        monkeypatch.setattr("sys.stderr", screen)
        assert has_terminal() == shown


def test_a_file_is_no_terminal(monkeypatch, tmp_path):
    with open(tmp_path / "log", "w") as file:
        monkeypatch.setattr("sys.stderr", file)
        assert not has_terminal()


@pytest.fixture
def logging_as_it_was():
    """Put back the handlers and settings that set_up_logging changes."""
    logs = [logging.getLogger(name) for name in ("fvcore", "detectron2", "fpn_d2")]
    before = [(log, list(log.handlers), log.propagate, log.level) for log in logs]
    yield
    for log, handlers, propagate, level in before:
        log.handlers[:] = handlers
        log.propagate = propagate
        log.setLevel(level)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("set_up_before", [False, True])
def test_the_log_file_has_all_and_the_terminal_what_fits(
    tmp_path, capsys, monkeypatch, logging_as_it_was, terminal, set_up_before
):
    monkeypatch.setattr(progress, "has_terminal", lambda: terminal)
    for log in ("fvcore", "detectron2", "fpn_d2"):
        logging.getLogger(log).handlers.clear()
    if set_up_before:
        setup_logger.cache_clear()  # it remembers which handlers it has added
        setup_logger()
        capsys.readouterr()
        logging.getLogger("detectron2").handlers[0].setStream(io.StringIO())
    set_up_logging(str(tmp_path), 0)
    said = {
        ("detectron2", "environment"): False,
        ("detectron2.engine.defaults", "model"): False,
        ("detectron2.utils.events", "losses"): not terminal,
        ("detectron2.evaluation.evaluator", "inference"): True,
        ("fpn_d2.engine.run", "results"): True,
    }
    for name, text in said:
        logging.getLogger(name).info(text)
    logging.getLogger("detectron2.data").warning("odd data")
    for handler in logging.getLogger("detectron2").handlers:
        handler.flush()
    shown = capsys.readouterr().out
    written = (tmp_path / "log.txt").read_text()
    for (_, text), on_terminal in said.items():
        assert text in written
        assert (text in shown) == on_terminal, text
    assert "odd data" in shown
