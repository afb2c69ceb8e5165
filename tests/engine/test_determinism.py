"""SOLVER.DETERMINISTIC, and SOLVER.BASE_LR_BATCH_SIZE."""

import os

import pytest
import torch
from detectron2.engine import HookBase

from fpn_d2.engine import Trainer, UserError
from fpn_d2.engine.determinism import check_deterministic, deterministic
from fpn_d2.engine.optimizer import scale_learning_rate

from .small import small_config

OPTS = ["DATASETS.TEST", "()", "TEST.PICTURE_IMAGES", 0]


class _Look(HookBase):
    def __init__(self):
        self.seen = []

    def after_step(self):
        self.seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))


@pytest.mark.parametrize("on", [True, False])
def test_a_training_is_in_the_mode_and_the_program_is_not_left_in_it(tmp_path, scenes, monkeypatch, on):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    trainer = Trainer(small_config(tmp_path, scenes, *OPTS, "SOLVER.MAX_ITER", 2, "SOLVER.DETERMINISTIC", on))
    look = _Look()
    trainer.register_hooks([look])
    trainer.train()
    assert look.seen == [(on, not on)] * 2
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark


def test_it_ends_with_the_weights_of_a_training_without_it(tmp_path, scenes):
    ends = []
    for name, on in (("a", True), ("b", True), ("c", False)):
        torch.manual_seed(1)
        trainer = Trainer(small_config(tmp_path / name, scenes, *OPTS, "SOLVER.DETERMINISTIC", on))
        trainer.resume_or_load(resume=False)
        trainer.train()
        ends.append(trainer.model.state_dict())
    for other in ends[1:]:
        assert all(torch.equal(value, other[name]) for name, value in ends[0].items())


def test_an_operation_that_cannot_is_named_in_one_sentence():
    def backward():
        raise RuntimeError(
            "roi_align_backward_kernel does not have a deterministic implementation, but you set 'torch.use_..."
        )

    with pytest.raises(UserError, match="^SOLVER.DETERMINISTIC: roi_align_backward_kernel cannot"), deterministic(True):
        backward()
    with pytest.raises(RuntimeError, match="other"), deterministic(True):
        raise RuntimeError("other")
    assert not torch.are_deterministic_algorithms_enabled()


def test_without_a_seed_it_is_refused(tmp_path, scenes, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    check_deterministic(small_config(tmp_path, scenes))
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with pytest.raises(UserError, match="set SEED"):
        check_deterministic(small_config(tmp_path, scenes, "SOLVER.DETERMINISTIC", True, "SEED", -1))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    check_deterministic(small_config(tmp_path, scenes, "SOLVER.DETERMINISTIC", True))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_the_learning_rate_is_scaled_on_request_and_the_rule_is_said(tmp_path, scenes, caplog):
    opts = [*OPTS, "SOLVER.BASE_LR", "0.02"]
    caplog.set_level("INFO", logger="fpn_d2")
    trainer = Trainer(small_config(tmp_path, scenes, *opts, "SOLVER.BASE_LR_BATCH_SIZE", 16))
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.0025}
    assert "SOLVER.BASE_LR: 0.02 for batches of 16 images becomes 0.02 x 2 / 16 = 0.0025" in caplog.text
    assert scale_learning_rate(trainer.cfg) is trainer.cfg  # once
    assert {g["lr"] for g in Trainer(small_config(tmp_path, scenes, *opts)).optimizer.param_groups} == {0.02}
    with pytest.raises(UserError, match="BASE_LR_BATCH_SIZE is -1"):
        scale_learning_rate(small_config(tmp_path, scenes, "SOLVER.BASE_LR_BATCH_SIZE", -1))
