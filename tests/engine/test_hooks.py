"""Validation loss, best checkpoint."""

import json
import os

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from fpn_d2.engine import Trainer, UserError
from fpn_d2.engine.hooks import BestCheckpoint, ValidationLoss, validation_losses

from .small import TEST, TRAIN, small_config


class _Watch(HookBase):
    """Keeps the training losses and, after each step, what torch would draw next."""

    def __init__(self):
        self.losses = []
        self.draws = []

    def after_step(self):
        self.losses.append(self.trainer.storage.latest()["total_loss"][0])
        state = torch.get_rng_state()
        self.draws.append(torch.rand(1).item())
        torch.set_rng_state(state)


def _trained(cfg, more_hooks=()):
    seed_all_rng(0)
    trainer = Trainer(cfg)
    trainer.register_hooks(list(more_hooks))
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer


QUIET = ["DATASETS.TEST", "()", "SOLVER.MAX_ITER", 3]


@pytest.mark.parametrize("norm", ["GN", "BN"])
def test_training_is_the_same_to_the_bit_with_and_without_validation_loss(tmp_path, scenes, norm):
    runs = {}
    for period in (0, 1):
        opts = ["SOLVER.MAX_ITER", 3, "TEST.VAL_LOSS_PERIOD", period, "MODEL.RESNETS.NORM", norm]
        # A range of sizes, so that the loader draws random numbers too.
        opts += ["INPUT.MIN_SIZE_TRAIN", "(48, 64)", "INPUT.MIN_SIZE_TEST", 48, "INPUT.CROP.ENABLED", "True"]
        cfg = small_config(tmp_path / str(period), scenes, *opts)
        watch = _Watch()
        trainer = _trained(cfg, [watch])
        runs[period] = (trainer.model.state_dict(), watch)
        assert ("val_total_loss" in trainer.storage.latest()) == bool(period)
    (plain, watched), (validated, watched_too) = runs.values()
    assert watched.losses == watched_too.losses
    assert watched.draws == watched_too.draws
    assert all(torch.equal(value, validated[name]) for name, value in plain.items())


@pytest.fixture
def trainer(tmp_path, scenes):
    return Trainer(small_config(tmp_path, scenes, *QUIET))


def test_validation_losses_are_the_mean_over_the_images_and_always_the_same(trainer, tmp_path, scenes):
    cfg = small_config(tmp_path / "v", scenes)
    first = validation_losses(cfg, trainer.model)
    torch.rand(5)
    assert validation_losses(cfg, trainer.model) == first
    parts = {k: v for k, v in first.items() if k != "total_loss"}
    assert set(parts) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    assert first["total_loss"] == pytest.approx(sum(parts.values()))
    assert trainer.model.training
    with torch.no_grad():
        for parameter in trainer.model.proposal_generator.parameters():
            parameter.add_(0.1)
    assert validation_losses(cfg, trainer.model)["loss_rpn_cls"] != first["loss_rpn_cls"]


def test_a_process_without_images_changes_nothing_of_the_mean(trainer, tmp_path, scenes, monkeypatch):
    cfg = small_config(tmp_path / "v", scenes)
    alone = validation_losses(cfg, trainer.model)
    monkeypatch.setattr(comm, "gather", lambda own: [({}, 0), own, ({}, 0)])
    assert validation_losses(cfg, trainer.model) == alone


@pytest.mark.parametrize("meta", ["GeneralizedRCNN", "RetinaNet"])
def test_validation_losses_of_an_image_do_not_depend_on_those_before(tmp_path, scenes, meta):
    """So they are the same however many processes share the images."""
    model, means = None, []
    for sets in ((TRAIN, TEST), (TEST, TRAIN)):
        cfg = small_config(
            tmp_path, scenes, "MODEL.META_ARCHITECTURE", meta, "DATASETS.TEST", str(sets),
            "MODEL.RETINANET.IN_FEATURES", "['p3', 'p4', 'p5', 'p6', 'p7']",
        )
        model = model or Trainer.build_model(cfg)
        means.append(validation_losses(cfg, model))
    assert means[0] == pytest.approx(means[1], rel=1e-5)


def test_validation_losses_leave_a_retinanet_as_it_was(tmp_path, scenes):
    """Its losses are divided by a running mean that every training step moves."""
    cfg = small_config(
        tmp_path, scenes, "MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.IN_FEATURES",
        "['p3', 'p4', 'p5', 'p6', 'p7']",
    )
    model = Trainer.build_model(cfg)
    model.loss_normalizer = 50.0
    losses = validation_losses(cfg, model)
    assert set(losses) == {"total_loss", "loss_cls", "loss_box_reg"}
    assert model.loss_normalizer == 50.0


def test_validation_losses_do_not_depend_on_the_running_training(trainer, tmp_path, scenes):
    cfg = small_config(tmp_path / "v", scenes)
    outside = validation_losses(cfg, trainer.model)
    with EventStorage(7) as storage:
        assert validation_losses(cfg, trainer.model) == outside
        assert storage.latest() == {}


def test_validation_loss_without_annotations_is_refused(tmp_path, scenes):
    content = json.loads((scenes / "annotations" / "instances_val.json").read_text())
    del content["annotations"]
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(content))
    entry = [["engine_bare", str(bare), str(scenes / "images" / "val")]]
    cfg = small_config(tmp_path / "v", scenes, "DATASETS.COCO_FORMAT", entry, "DATASETS.TRAIN", "()",
                       "DATASETS.TEST", "('engine_bare',)")
    with pytest.raises(UserError, match="engine_bare has none"):
        ValidationLoss(cfg)


class _Score(HookBase):
    """Stands for an evaluation: puts a given score into the storage after each step."""

    def __init__(self, scores, metric="bbox/AP"):
        self._scores = scores
        self._metric = metric

    def after_step(self):
        done = self.trainer.iter + 1
        self.trainer.storage.put_scalar(self._metric, self._scores[done - 1], smoothing_hint=False)


def _train_with_scores(folder, scenes, scores, resume=False, max_iter=None, metric="bbox/AP"):
    iterations = max_iter or len(scores)
    cfg = small_config(folder, scenes, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", iterations,
                       "SOLVER.CHECKPOINT_PERIOD", 1)
    trainer = Trainer(cfg)
    best = BestCheckpoint(metric, 1, trainer.checkpointer)
    trainer.register_hooks([_Score(scores, metric), best])
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return torch.load(trainer.checkpointer.save_dir + "/model_best.pth")["iteration"] + 1


@pytest.mark.parametrize(
    ("scores", "best"),
    [([1.0, 3.0, 2.0], 2), ([float("nan"), 1.0, float("nan")], 2), ([0.0, 0.0, 0.0], 1), ([1.0, 2.0, 3.0], 3)],
)
def test_the_best_checkpoint_is_kept(tmp_path, scenes, scores, best):
    assert _train_with_scores(tmp_path, scenes, scores) == best


def test_the_best_value_survives_a_resumed_training(tmp_path, scenes):
    scores = [5.0, 1.0, 4.0, 6.0]
    assert _train_with_scores(tmp_path, scenes, scores, max_iter=2) == 1
    assert _train_with_scores(tmp_path, scenes, scores, resume=True, max_iter=3) == 1
    assert _train_with_scores(tmp_path, scenes, scores, resume=True, max_iter=4) == 4
    # A training that starts anew in the same folder starts with no best value.
    assert _train_with_scores(tmp_path, scenes, [0.5, 0.4]) == 1


def test_another_metric_on_resume_starts_without_a_best_value(tmp_path, scenes):
    """The AP of masks is lower than that of boxes: the best of the one says nothing about the other."""
    assert _train_with_scores(tmp_path, scenes, [50.0, 60.0]) == 2
    scores = [0.0, 0.0, 2.0, 1.0, 3.0]
    assert _train_with_scores(tmp_path, scenes, scores, resume=True, max_iter=4, metric="segm/AP") == 3
    record = json.loads((tmp_path / "out" / "model_best.json").read_text())
    assert record == {"metric": "segm/AP", "value": 2.0, "iterations": 3}
    assert _train_with_scores(tmp_path, scenes, scores, resume=True, max_iter=5, metric="segm/AP") == 5


def test_a_metric_that_is_not_measured_is_named_with_those_that_are(tmp_path, scenes, caplog):
    cfg = small_config(tmp_path, scenes, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 1)
    trainer = Trainer(cfg)
    trainer.register_hooks([_Score([1.0]), BestCheckpoint("bbox/AP5", 0, trainer.checkpointer)])
    trainer.train()
    assert "bbox/AP5 was not measured" in caplog.text
    assert "there are: bbox/AP" in caplog.text
    assert not os.path.exists(trainer.checkpointer.save_dir + "/model_best.pth")


@pytest.mark.parametrize("period", [0, 5])
def test_the_trainer_keeps_the_best_where_there_is_a_choice(tmp_path, scenes, period):
    """With an evaluation at the end alone, the "best" would be the last."""
    cfg = small_config(tmp_path, scenes, "SOLVER.MAX_ITER", 2, "TEST.BEST_METRIC", "bbox/AP50",
                       "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.EVAL_PERIOD", period)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    if not period:
        assert results["bbox"]["AP50"] >= 0 and not list((tmp_path / "out").glob("model_best*"))
        return
    record = json.loads((tmp_path / "out" / "model_best.json").read_text())
    assert record == {"metric": "bbox/AP50", "value": results["bbox"]["AP50"], "iterations": 2}
    assert TEST in cfg.DATASETS.TEST
