"""The trainer: what it loads, saves, resumes and evaluates."""

import json
import logging

import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.evaluation import COCOEvaluator

from fpn_d2.engine import Trainer, UserError, build_evaluator
from fpn_d2.engine import trainer as trainer_module

from .small import TEST, small_config

NO_TEST = ["DATASETS.TEST", "()"]


def test_the_training_loader_uses_our_mapper(tmp_path, scenes, monkeypatch):
    cfg = small_config(tmp_path, scenes)
    asked = []

    def mapper(cfg, is_train):
        asked.append((cfg, is_train))
        return lambda record: {"seen": record["file_name"], "width": 1, "height": 1}

    monkeypatch.setattr(trainer_module, "TrainingMapper", mapper)
    batch = next(iter(Trainer.build_train_loader(cfg)))
    assert asked == [(cfg, True)]
    assert all("images/train" in image["seen"] for image in batch)


def test_evaluation_reads_by_our_mapper_the_pixels_of_detectron2s(tmp_path, scenes, monkeypatch):
    sizes = ["INPUT.MIN_SIZE_TEST", 150, "INPUT.MAX_SIZE_TEST", 400]  # larger than the scenes
    cfg = small_config(tmp_path, scenes, *sizes)
    assert cfg.MODEL.NUMERICS == "fast"
    expected = list(build_detection_test_loader(cfg, TEST))
    monkeypatch.setattr(DatasetMapper, "__call__", None)
    for ours, theirs in zip(Trainer.build_test_loader(cfg, TEST), expected, strict=True):
        assert torch.equal(ours[0]["image"], theirs[0]["image"]) and ours[0].keys() == theirs[0].keys()


def test_a_resumed_training_goes_on_with_the_optimizer(tmp_path, scenes):
    cfg = small_config(tmp_path, scenes, *NO_TEST, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2)
    first = Trainer(cfg)
    first.resume_or_load(resume=False)
    first.max_iter = 2
    first.train()
    momentum = [state["momentum_buffer"] for state in first.optimizer.state.values()]
    assert any(buffer.abs().max() > 0 for buffer in momentum)

    second = Trainer(cfg)
    second.resume_or_load(resume=True)
    assert second.start_iter == 2
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])
    restored = [state["momentum_buffer"] for state in second.optimizer.state.values()]
    assert len(restored) == len(momentum)
    assert all(torch.equal(a, b) for a, b in zip(momentum, restored, strict=True))
    second.train()
    assert second.iter == 4
    assert (tmp_path / "out" / "model_final.pth").is_file()
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_final.pth"


def test_a_checkpoint_without_optimizer_state_is_resumed_with_a_warning(tmp_path, scenes, caplog):
    cfg = small_config(tmp_path, scenes, *NO_TEST, "SOLVER.MAX_ITER", 1)
    trainer = Trainer(cfg)
    state = trainer.state_dict()
    del state["_trainer"]
    state["iteration"] = 7
    trainer.load_state_dict(state)
    assert trainer.iter == 7
    assert "no optimizer state" in caplog.text


def test_without_resume_the_weights_are_loaded_and_nothing_else(tmp_path, scenes):
    cfg = small_config(tmp_path, scenes, *NO_TEST, "SOLVER.MAX_ITER", 1)
    first = Trainer(cfg)
    first.train()
    cfg = small_config(tmp_path, scenes, *NO_TEST, "MODEL.WEIGHTS", tmp_path / "out" / "model_final.pth")
    second = Trainer(cfg)
    second.resume_or_load(resume=False)
    assert second.start_iter == 0
    assert not second.optimizer.state
    assert torch.equal(second.model.backbone.fpn_output2.weight, first.model.backbone.fpn_output2.weight)


def test_training_evaluates_logs_and_returns_the_results(tmp_path, scenes, caplog, capsys):
    cfg = small_config(tmp_path, scenes, "SOLVER.MAX_ITER", 3, "TEST.EVAL_PERIOD", 2, "TEST.VAL_LOSS_PERIOD", 2,
                       "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    caplog.set_level(logging.INFO)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    assert set(results["bbox"]) >= {"AP", "AP50", "AP75", "APs", "APm", "APl"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    written = {key for line in lines for key in line}
    assert written >= {"total_loss", "loss_cls", "lr", "bbox/AP", "val_total_loss", "val_loss_cls"}
    # What is measured behind the last step is written too: at 3, where the period has not come round.
    assert [line["iteration"] for line in lines if "val_total_loss" in line][-1] == 2
    # As they are, not as medians of the last 20: they are means over all images already.
    hints = trainer.storage.smoothing_hints()
    assert not any(hint for name, hint in hints.items() if name.startswith("val_"))
    assert list((tmp_path / "out").glob("events.out.tfevents.*"))
    # What pycocotools prints goes to the log.
    assert "Average Precision" not in capsys.readouterr().out
    assert "Average Precision" in caplog.text


def test_on_several_gpus_the_model_is_joined_as_detectron2_joins_it(monkeypatch):
    """Without sending the statistics of frozen norms in each step. "meta" stands for a GPU."""
    joined = []
    monkeypatch.setattr(trainer_module.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(trainer_module, "create_ddp_model", lambda model, **options: joined.append(options) or "on GPU")
    monkeypatch.setattr(trainer_module, "DistributedDataParallel", lambda model, **options: joined.append(options))
    assert trainer_module._distributed(torch.nn.Linear(1, 1, device="meta")) == "on GPU"
    assert trainer_module._distributed(torch.nn.Linear(1, 1)) is None
    assert joined == [{"broadcast_buffers": False}] * 2
    monkeypatch.setattr(trainer_module.comm, "get_world_size", lambda: 1)
    assert trainer_module._distributed(torch.nn.Linear(1, 1)) == "on GPU"  # which leaves one process alone


def test_test_time_augmentation_is_evaluated_too(tmp_path, scenes):
    opts = ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(48, 64)", "TEST.AUG.MAX_SIZE", 64]
    opts += ["SOLVER.MAX_ITER", 1, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    cfg = small_config(tmp_path, scenes, *opts)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    assert set(results) == {"bbox", "bbox_TTA"}
    assert results["bbox"] != results["bbox_TTA"]
    assert "bbox_TTA/AP" in trainer.storage.latest()


def test_expected_results_are_verified(tmp_path, scenes):
    for expected, passes in ((0.0, True), (99.0, False)):
        cfg = small_config(tmp_path, scenes, "SOLVER.MAX_ITER", 1, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0,
                           "TEST.EXPECTED_RESULTS", [["bbox", "AP", expected, 50.0]])
        trainer = Trainer(cfg)
        if passes:
            trainer.train()
        else:
            with pytest.raises(SystemExit):
                trainer.train()


def test_evaluators_by_the_type_of_the_data_set(tmp_path, scenes):
    cfg = small_config(tmp_path, scenes)
    assert isinstance(build_evaluator(cfg, TEST), COCOEvaluator)
    cases = {"pascal_voc": "PascalVOCDetectionEvaluator", "sem_seg": "SemSegEvaluator"}
    for kind, evaluator in cases.items():
        name = f"engine_type_{kind}"
        MetadataCatalog.get(name).set(
            evaluator_type=kind, dirname=str(tmp_path), split="val", year=2007, thing_classes=["a"],
            stuff_classes=["a", "b"], ignore_label=255,
        )
        DatasetCatalog.register(name, list)
        try:
            assert type(build_evaluator(cfg, name)).__name__ == evaluator
        finally:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_an_unknown_evaluator_type_is_refused(tmp_path, scenes):
    cfg = small_config(tmp_path, scenes)
    MetadataCatalog.get("engine_odd").set(evaluator_type="kitti")
    try:
        with pytest.raises(UserError, match="'kitti'; there are .*coco"):
            build_evaluator(cfg, "engine_odd")
    finally:
        MetadataCatalog.remove("engine_odd")


def test_what_a_checkpoint_knows_of_processes_and_numbers(tmp_path, scenes, caplog):
    """Both go into the state, and out of it: a module's running number, and how many processes there were."""
    trainer = Trainer(small_config(tmp_path, scenes, *NO_TEST))
    trainer.model.running_mean_of_objects = 7.5
    state = trainer.state_dict()
    assert state["processes"] == 1
    trainer.model.running_mean_of_objects = 1.0
    with caplog.at_level(logging.WARNING):
        trainer.load_state_dict(state)
        assert "processes" not in caplog.text and trainer.model.running_mean_of_objects == 7.5
        inner = state["_trainer"] | {"iteration": 3}
        trainer.load_state_dict(state | {"processes": 3, "_trainer": inner})
    assert "The training had 3 processes and has 1" in caplog.text and trainer._trainer.iter == 3


def test_the_order_of_the_images_follows_the_seed(tmp_path, scenes):
    def order(seed):
        loader = Trainer.build_train_loader(small_config(tmp_path, scenes, "SEED", seed))
        batches = iter(loader)
        return [image["file_name"] for _ in range(4) for image in next(batches)]

    first = order(1)
    assert order(1) == first and sorted(set(first)) != first
    assert len({tuple(order(seed)) for seed in (1, 2, 3, 4)}) > 1
