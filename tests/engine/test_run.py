"""What each process does: checks before any work starts, Ctrl-C, and the line at the end."""

import argparse
import importlib.metadata
import logging
import signal
import sys

import pytest
import torch
import yaml
from detectron2.engine import HookBase
from detectron2.utils import comm

import fpn_d2
from fpn_d2.engine import ReportingCheckpointer, Trainer, load_prepared, run
from fpn_d2.engine.device import on_this_machine
from fpn_d2.engine.run import _show, _train
from fpn_d2.errors import UserError
from tests import lite_package

from .small import TRAIN, small_config, write_config

NO_TEST = ["DATASETS.TEST", "()", "TEST.BEST_METRIC", ""]


class _Interrupt(HookBase):
    """Presses Ctrl-C after some iterations: as the terminal does, or twice, so that nothing more is saved."""

    def __init__(self, after, at_once):
        self._after = after
        self._at_once = at_once

    def before_step(self):
        if self.trainer.iter == self._after:
            if self._at_once:
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)


def _stopped(folder, scenes, capsys, *, after=0, at_once=True, resume=False):
    """What a training that is stopped says on stderr."""
    cfg = small_config(folder, scenes, *NO_TEST, "SOLVER.MAX_ITER", 9, "SOLVER.CHECKPOINT_PERIOD", 2)
    trainer = Trainer(cfg)
    trainer.register_hooks([_Interrupt(after, at_once)])
    trainer.resume_or_load(resume=resume)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        _train(trainer)
    assert end.value.code == 130
    return capsys.readouterr().err


def test_ctrl_c_names_the_checkpoint_of_this_run_only(tmp_path, scenes, capsys):
    assert "Stopped. No checkpoint was saved." in _stopped(tmp_path, scenes, capsys)
    saved = f"The last checkpoint is {tmp_path}/out/model_0000001.pth; the same command with --resume"
    assert saved in _stopped(tmp_path, scenes, capsys, after=1, at_once=False)
    # A run that starts anew in the same folder does not go on from that one; a resumed run does.
    assert "Stopped. No checkpoint was saved." in _stopped(tmp_path, scenes, capsys)
    assert saved in _stopped(tmp_path, scenes, capsys, after=2, resume=True)


def test_only_the_main_process_speaks_of_ctrl_c(tmp_path, scenes, capsys, monkeypatch):
    cfg = small_config(tmp_path, scenes, *NO_TEST)
    trainer = Trainer(cfg)
    trainer.register_hooks([_Interrupt(0, True)])
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    with pytest.raises(SystemExit):
        _train(trainer)
    assert "Stopped" not in capsys.readouterr().err


def test_the_line_with_the_result_comes_without_a_picture_too(tmp_path, scenes, capsys, caplog):
    cfg = small_config(tmp_path, scenes)
    model = Trainer.build_model(cfg)
    results = {"bbox": {"AP": 10.0, "AP50": 23.4}}
    _show(cfg, model, results)
    picture = tmp_path / "out" / "detections.png"
    assert capsys.readouterr().out.splitlines()[-1] == f"AP50 23.4  picture: {picture}"
    assert not [r for r in caplog.records if r.levelname == "WARNING" and "picture" in r.message]
    picture.unlink()
    picture.mkdir()  # now it cannot be written
    _show(cfg, model, results)
    assert capsys.readouterr().out.splitlines()[-1] == "AP50 23.4"
    assert len([r for r in caplog.records if r.levelname == "WARNING" and "No picture" in r.message]) == 1


def test_augmentation_that_the_model_cannot_have_is_refused_before_training(tmp_path, scenes, capsys):
    cfg = small_config(tmp_path, scenes, "MODEL.META_ARCHITECTURE", "ProposalNetwork", "TEST.AUG.ENABLED", "True")
    with pytest.raises(SystemExit) as end:
        run(argparse.Namespace(resume=False, eval_only=False), cfg)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: TEST.AUG.ENABLED")


def test_a_configuration_at_home_is_found_where_detectron2_prints_it(tmp_path, scenes, monkeypatch):
    """After --config-file=~/c.yaml, in which no shell replaces the ~."""
    seen = []

    def setup(cfg, args):
        seen.append(args.config_file)
        raise UserError("enough")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys.modules["fpn_d2.engine.run"], "default_setup", setup)
    with pytest.raises(SystemExit):
        run(argparse.Namespace(resume=False, eval_only=False, config_file="~/c.yaml"), small_config(tmp_path, scenes))
    assert seen == [str(tmp_path / "c.yaml")]


def _asked_for(folder, scenes, *opts):
    cfg = load_prepared(str(write_config(folder / "config.yaml", scenes)), [str(o) for o in opts])
    return cfg, folder / "out" / "config.yaml"


def _runs(cfg, eval_only=False, resume=False):
    run(argparse.Namespace(resume=resume, eval_only=eval_only, config_file=""), cfg)


def test_config_yaml_is_what_was_asked_for_and_an_evaluation_leaves_it_alone(tmp_path, scenes, monkeypatch, capfd):
    weights = tmp_path / "gone.pth"  # MODEL.TIMM.WEIGHTS is not read by this model
    cfg, written = _asked_for(tmp_path, scenes, "MODEL.TIMM.WEIGHTS", weights, "SOLVER.MAX_ITER", 1)
    asked = cfg.dump()
    _runs(cfg)
    assert yaml.safe_load(written.read_text()) == yaml.safe_load(asked)
    assert "DEVICE: cuda" in asked and f"WEIGHTS: {weights}" in asked
    before = written.read_bytes()
    evaluated = ["MODEL.WEIGHTS", tmp_path / "out" / "model_final.pth", "TEST.PICTURE_IMAGES", 0]
    cfg, _ = _asked_for(tmp_path, scenes, *evaluated)
    _runs(cfg, eval_only=True)
    assert written.read_bytes() == before
    assert "PICTURE_IMAGES: 0" in (tmp_path / "out" / "log.txt").read_text()
    assert capfd.readouterr().out.count("Results in percent") == 2  # no line comes twice
    # In a folder of its own, an evaluation writes what it was asked for.
    cfg, _ = _asked_for(tmp_path, scenes, *evaluated, "OUTPUT_DIR", tmp_path / "other")
    _runs(cfg, eval_only=True)
    assert yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())["MODEL"]["DEVICE"] == "cuda"


def test_what_a_training_with_packaged_weights_leaves_needs_the_package_no_more(tmp_path, scenes, monkeypatch):
    pytest.importorskip("timm")
    preprocessing = ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [127.5] * 3, "MODEL.PIXEL_STD", [127.5] * 3]
    keys = ["MODEL.FPN.BOTTOM_UP", "build_timm_backbone", "MODEL.TIMM.WEIGHTS", "package:efficientnet_lite0"]
    keys += [*preprocessing, "TEST.PICTURE_IMAGES", 0, "SOLVER.MAX_ITER"]
    with monkeypatch.context() as patch:
        lite_package.install(tmp_path / "installed", patch, lite_package.random_file())
        _runs(_asked_for(tmp_path, scenes, *keys, 1)[0])
    monkeypatch.setattr(importlib.metadata, "distribution", _not_installed)
    with pytest.raises(SystemExit):
        _runs(_asked_for(tmp_path, scenes, *keys, 1)[0])
    _runs(_asked_for(tmp_path, scenes, *keys, 2)[0], resume=True)
    final = tmp_path / "out" / "model_final.pth"
    assert torch.load(final)["iteration"] == 1
    held = yaml.safe_load(torch.load(final)["fpn_d2"]["config"])["MODEL"]["TIMM"]
    assert held["WEIGHTS"] == "package:efficientnet_lite0"  # what the training started from is not forgotten
    _runs(_asked_for(tmp_path, scenes, *keys, 2, "MODEL.WEIGHTS", final)[0], eval_only=True)
    assert fpn_d2.load(final, device="cpu").model.backbone.bottom_up.output_shape()["res5"].channels == 320


def _not_installed(name):
    raise importlib.metadata.PackageNotFoundError(name)


def test_an_evaluation_runs_without_the_training_set(tmp_path, scenes, capfd):
    cfg, _ = _asked_for(tmp_path, scenes)
    ReportingCheckpointer(Trainer.build_model(on_this_machine(cfg)), str(tmp_path)).save("weights")
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("instances_train.json", "gone.json").replace(TRAIN, "gone_scenes"))
    opts = ["MODEL.WEIGHTS", str(tmp_path / "weights.pth")]
    _runs(load_prepared(str(path), opts, train=False), eval_only=True)
    assert capfd.readouterr().out.splitlines()[-1].startswith("AP50 ")


def test_a_finished_training_that_is_resumed_says_that_nothing_is_left(tmp_path, scenes, caplog, monkeypatch):
    said = []
    monkeypatch.setattr(logging.getLogger("fpn_d2.engine.run"), "warning", lambda text, *a: said.append(text % a))
    opts = [*NO_TEST, "SOLVER.MAX_ITER"]
    _runs(_asked_for(tmp_path, scenes, *opts, 1)[0])
    assert said == []
    _runs(_asked_for(tmp_path, scenes, *opts, 1)[0], resume=True)
    assert len(said) == 1 and f"Nothing is left to train: {tmp_path}/out/model_final.pth" in said[0]
    said.clear()
    _runs(_asked_for(tmp_path, scenes, *opts, 2)[0], resume=True)
    assert said == []


def test_a_schedule_within_the_warm_up_is_warned_of(tmp_path, scenes, caplog, monkeypatch):
    cfg, _ = _asked_for(tmp_path, scenes, *NO_TEST, "SOLVER.MAX_ITER", 1, "SOLVER.WARMUP_ITERS", 100)
    said = []
    monkeypatch.setattr(logging.getLogger("fpn_d2.engine.run"), "warning", lambda text, *_: said.append(text))
    _runs(cfg)
    assert len([text for text in said if "SOLVER.WARMUP_ITERS is 100" in text]) == 1


def test_a_batch_that_processes_cannot_share_is_refused_before_training(tmp_path, scenes, monkeypatch, capsys):
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    with pytest.raises(SystemExit) as end:
        _runs(small_config(tmp_path, scenes))  # batches of 2
    assert end.value.code == 2
    assert "SOLVER.IMS_PER_BATCH is 2, which 3 processes cannot share equally" in capsys.readouterr().err


def test_a_mistake_that_training_meets_ends_it_with_the_status_of_mistakes(tmp_path, scenes, capsys):
    class Mistaken(HookBase):
        def before_step(self):
            raise UserError("this is not right")

    trainer = Trainer(small_config(tmp_path, scenes, *NO_TEST))
    trainer.register_hooks([Mistaken()])
    with pytest.raises(SystemExit) as end:
        _train(trainer)
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: this is not right")
