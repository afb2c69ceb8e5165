"""Ctrl-C and SIGTERM: what is saved, when, and what a second one does."""

import os
import signal

import pytest
import torch
from detectron2.engine import DefaultTrainer, HookBase, hooks

from fpn_d2.engine import Trainer
from fpn_d2.engine import signals as signals_module
from fpn_d2.engine.signals import Signals, Stopped, signals

from .small import small_config

NO_TEST = ["DATASETS.TEST", "()", "TEST.BEST_METRIC", ""]


class _Signal(HookBase):
    """Sends this process a signal before an iteration."""

    def __init__(self, iteration, number):
        self._iteration, self._number = iteration, number

    def before_step(self):
        if self.trainer.iter == self._iteration:
            signal.raise_signal(self._number)


def _trainer(folder, scenes, *opts):
    trainer = Trainer(small_config(folder, scenes, "SOLVER.MAX_ITER", 9, *opts))
    trainer.resume_or_load(resume=False)
    return trainer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_iteration_and_saves(tmp_path, scenes, number):
    before = signal.getsignal(number)
    trainer = _trainer(tmp_path, scenes, *NO_TEST)
    trainer.register_hooks([_Signal(1, number)])
    with pytest.raises(Stopped) as stop:
        trainer.train()
    assert stop.value.number == number
    assert trainer.checkpointer.get_checkpoint_file().endswith("model_0000001.pth")
    assert torch.load(trainer.checkpointer.get_checkpoint_file())["iteration"] == 1
    assert signal.getsignal(number) == before


def test_a_signal_stops_an_evaluation_which_is_made_up_for(tmp_path, scenes, monkeypatch):
    trainer = _trainer(tmp_path, scenes, "TEST.EVAL_PERIOD", 2)
    evaluated = []

    def evaluate(cls, cfg, model, evaluators=None):
        evaluated.append(model)
        if len(evaluated) == 1:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("the signal did not stop it")
        return {"bbox": {"AP": 1.0}}

    monkeypatch.setattr(DefaultTrainer, "test", classmethod(evaluate))
    with pytest.raises(Stopped):
        trainer.train()
    assert trainer.checkpointer.get_checkpoint_file().endswith("model_0000001.pth")
    again = Trainer(small_config(tmp_path, scenes, "SOLVER.MAX_ITER", 3, "TEST.EVAL_PERIOD", 2))
    again.resume_or_load(resume=True)
    again.train()
    assert evaluated == [trainer.model, again.model, again.model]  # anew, and the one at the end


def test_the_last_iteration_is_not_evaluated_after_a_signal(tmp_path, scenes, monkeypatch):
    trainer = _trainer(tmp_path, scenes, "SOLVER.MAX_ITER", 6)  # Detectron2 measures time from the fourth on
    trainer.register_hooks([_Signal(5, signal.SIGTERM)])
    monkeypatch.setattr(hooks.EvalHook, "_do_eval", lambda hook: pytest.fail("evaluated"))
    with pytest.raises(Stopped):
        trainer.train()
    assert (tmp_path / "out" / "model_final.pth").is_file()


@pytest.mark.parametrize("iteration", [0, 1, 2])
def test_an_end_in_the_first_iterations_is_no_division_by_zero(tmp_path, scenes, monkeypatch, iteration):
    """After an iteration that has been written, Detectron2's printer divides by the iterations since."""
    monkeypatch.setattr(hooks.PeriodicWriter, "after_step", lambda hook: [w.write() for w in hook._writers])
    trainer = _trainer(tmp_path, scenes, *NO_TEST)
    trainer.register_hooks([_Signal(iteration, signal.SIGTERM)])
    with pytest.raises(Stopped):
        trainer.train()
    assert trainer.checkpointer.get_checkpoint_file().endswith(f"model_{iteration:07d}.pth")


@pytest.fixture
def later(monkeypatch):
    """Makes each signal come long after the one before."""
    monkeypatch.setattr(signals_module, "_SAME_WISH", -1.0)


def test_a_first_signal_is_held_back_and_a_second_one_is_not(later):
    with signals.installed(), signals.held_back():
        signal.raise_signal(signal.SIGTERM)
        assert signals.agreed() == signal.SIGTERM
        with pytest.raises(Stopped) as stop:
            signal.raise_signal(signal.SIGINT)
    assert stop.value.number == signal.SIGINT


def test_one_wish_that_arrives_twice_is_one():
    with signals.installed(), signals.held_back():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert signals.agreed() == signal.SIGINT


def test_a_held_back_signal_comes_true_where_it_may(later):
    with signals.installed(), signals.held_back():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stopped), signals.held_back(False):
            pytest.fail("went on")


def test_a_checkpoint_is_written_to_its_end_and_only_a_third_signal_breaks_it(later, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with signals.installed(), signals.held_back(), signals.saving():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert ended == []
        signal.raise_signal(signal.SIGTERM)
    assert ended == [143]


def test_without_any_context_a_signal_raises_at_once():
    with Signals().installed(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
