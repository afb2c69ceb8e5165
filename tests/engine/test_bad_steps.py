"""Losses and gradients that are not finite: the step is left out, written down and can be made again."""

import copy
import logging

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase
from detectron2.structures import Instances, PolygonMasks

from fpn_d2.cli import main
from fpn_d2.engine import Trainer, UserError
from fpn_d2.engine import bad_steps as bad_steps_module
from fpn_d2.engine.bad_steps import FOLDER
from fpn_d2.engine.replay import batch_of, plain_batch

from .small import small_config

OPTS = ["DATASETS.TEST", "()", "TEST.PICTURE_IMAGES", 0]
STEM = "backbone.bottom_up.stem.conv1"


class _Spoil(HookBase):
    """Spoils the model before some iterations, and puts it right again after each."""

    def __init__(self, *iterations, gradient=False, keep=False):
        self._iterations, self._gradient, self._keep = iterations, gradient, keep
        self.weights = []  # after each iteration

    def before_step(self):
        model = self.trainer.model
        self._handle = None
        if self.trainer.iter in self._iterations:
            if self._gradient:
                weight = model.get_parameter(f"{STEM}.weight")
                self._handle = weight.register_hook(lambda gradient: gradient * float("nan"))
            else:
                conv = model.get_submodule("backbone.fpn_output3")
                self._handle = conv.register_forward_hook(lambda module, inputs, output: output * float("inf"))

    def after_step(self):
        if self._handle is not None and not self._keep:
            self._handle.remove()
        self.weights.append(copy.deepcopy(self.trainer.model.state_dict()))


def _train(tmp_path, scenes, spoil, *opts):
    trainer = Trainer(small_config(tmp_path, scenes, *OPTS, "SOLVER.MAX_ITER", 5, *opts))
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([spoil])
    trainer.train()
    return trainer


def _same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("opts", [(), ("SOLVER.OPTIMIZER", "AdamW"), ("SOLVER.CLIP_GRADIENTS.ENABLED", True)])
def test_the_step_is_not_taken_and_the_training_goes_on(tmp_path, scenes, caplog, gradient, opts):
    spoil = _Spoil(2, gradient=gradient)
    _train(tmp_path, scenes, spoil, *opts)
    assert _same(spoil.weights[1], spoil.weights[2])
    assert not _same(spoil.weights[0], spoil.weights[1]) and not _same(spoil.weights[2], spoil.weights[3])
    assert all(torch.isfinite(value).all() for value in spoil.weights[-1].values())
    where = f"the gradient of {STEM}.weight" if gradient else "backbone.fpn_output3 (Conv2d)"
    warnings = [record.message for record in caplog.records if "The step is not taken" in record.message]
    assert len(warnings) == 1 and f"first in {where}" in warnings[0] and "scenes" in warnings[0]
    assert (tmp_path / "out" / "model_final.pth").exists()


def test_running_statistics_stay_as_they_were(tmp_path, scenes):
    spoil = _Spoil(2)
    _train(tmp_path, scenes, spoil, "MODEL.FPN.NORM", "BN")
    statistics = [name for name in spoil.weights[0] if name.endswith("running_var")]
    assert statistics and _same(spoil.weights[1], spoil.weights[2])
    assert not torch.equal(spoil.weights[0][statistics[0]], spoil.weights[1][statistics[0]])


def test_over_the_limit_it_stops_with_the_likely_causes_and_nothing_of_it_is_saved(tmp_path, scenes):
    opts = ["SOLVER.MAX_BAD_STEPS", 2, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER", 9]
    with pytest.raises(UserError) as error:
        _train(tmp_path, scenes, _Spoil(2, 3, 4, 5), *opts)
    text = str(error.value)
    assert "in 3 steps" in text and "SOLVER.BASE_LR is too high" in text and "MAX_BAD_STEPS is 2" in text
    # After the first one the weights may still be sound; after the second they are taken for lost.
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_0000002.pth"
    assert sorted(path.name for path in (tmp_path / "out" / FOLDER).iterdir()) == [
        f"{i:07d}_rank0.pth" for i in (2, 3, 4)
    ]


def test_the_count_survives_a_resume(tmp_path, scenes):
    opts = ["SOLVER.MAX_BAD_STEPS", 1, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER", 3]
    _train(tmp_path, scenes, _Spoil(0), *opts)
    trainer = Trainer(small_config(tmp_path, scenes, *OPTS, *opts, "SOLVER.MAX_ITER", 5))
    trainer.resume_or_load(resume=True)
    trainer.register_hooks([_Spoil(4)])
    with pytest.raises(UserError, match="in 2 steps"):
        trainer.train()


def test_weights_that_are_not_finite_are_not_saved(tmp_path, scenes, caplog):
    trainer = Trainer(small_config(tmp_path, scenes, *OPTS))
    trainer.checkpointer.save("model_0000001", iteration=1)
    with torch.no_grad():
        trainer.model.get_parameter(f"{STEM}.weight")[0] = float("nan")
    trainer.checkpointer.save("model_0000002", iteration=2)
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not (tmp_path / "out" / "model_0000002.pth").exists()
    assert f"model_0000002.pth is not saved: {STEM}.weight is not finite" in caplog.text


def test_a_step_is_made_again_from_its_file(tmp_path, scenes, capsys):
    """Weights that overflow, without a hook that a replay could not know."""

    class _Overflow(HookBase):
        def before_step(self):
            if self.trainer.iter in (2, 3):
                with torch.no_grad():
                    self.trainer.model.get_parameter("backbone.fpn_output3.weight").fill_(3e38)

    _train(tmp_path, scenes, _Overflow(), "SOLVER.MAX_BAD_STEPS", 3, "SOLVER.MAX_ITER", 4)
    folder = tmp_path / "out" / FOLDER
    capsys.readouterr()
    for number in (2, 3):  # the second has its weights in the first one's file
        assert main(["replay", str(folder / f"{number:07d}_rank0.pth")]) == 0
        said = capsys.readouterr().out
        then, now = (line.split(":")[1].split() for line in said.splitlines() if line.startswith("losses"))
        assert then == now and f"iteration {number}," in said
        assert "first value that is not finite: backbone.fpn_output3 (Conv2d)" in said
    sizes = [path.stat().st_size for path in sorted(folder.iterdir())]
    assert sizes[1] < sizes[0] / 10


def test_another_file_is_no_step(tmp_path, scenes, capsys):
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "a.pth")
    assert main(["replay", str(tmp_path / "a.pth")]) == 2
    assert "holds no training step" in capsys.readouterr().err


def test_a_batch_survives_its_file(tmp_path, scenes):
    trainer = Trainer(small_config(tmp_path, scenes, *OPTS, "MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "bitmask"))
    batch = next(iter(trainer.data_loader))
    torch.save(plain_batch(batch), tmp_path / "batch.pth")
    again = batch_of(torch.load(tmp_path / "batch.pth", weights_only=True))
    for a, b in zip(batch, again, strict=True):
        assert a.keys() == b.keys() and a["file_name"] == b["file_name"] and torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
        assert torch.equal(a["instances"].gt_masks.tensor, b["instances"].gt_masks.tensor)
    corners = PolygonMasks([[np.array([0.0, 0, 3, 0, 3, 2])]])
    image = {"instances": Instances((4, 4), gt_masks=corners), "width": 4}
    again = batch_of(plain_batch([image]))[0]
    assert again["width"] == 4 and again["instances"].gt_masks.area() == corners.area()


def test_infinite_gradients_are_left_to_a_loss_scaler(tmp_path, scenes):
    watch = Trainer(small_config(tmp_path, scenes, *OPTS))._bad_steps
    weight = watch._model.get_parameter(f"{STEM}.weight")
    weight.grad = torch.full_like(weight, float("inf"))
    watch._scaled = True
    assert not watch.bad_gradients({})
    watch._scaled = False
    assert watch.bad_gradients({"loss": torch.tensor(1.0)})


def test_all_processes_agree(tmp_path, scenes, monkeypatch):
    """Another process has met it: this one leaves the step out too."""
    watch = Trainer(small_config(tmp_path, scenes, *OPTS))._bad_steps
    assert not watch.bad_losses({"loss": torch.tensor(1.0)}, "")
    monkeypatch.setattr(bad_steps_module.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(bad_steps_module.dist, "all_reduce", lambda value, op: value.fill_(1))
    assert watch.bad_losses({"loss": torch.tensor(1.0)}, "")


def test_the_warning_is_no_traceback(tmp_path, scenes, caplog):
    with caplog.at_level(logging.WARNING):
        _train(tmp_path, scenes, _Spoil(1), "SOLVER.MAX_ITER", 2)
    assert all("\n" not in record.message for record in caplog.records if record.name.endswith("bad_steps"))
