"""What is sent to Weights & Biases, to a package that only looks like it."""

import importlib
import sys

import pytest
from detectron2.utils.events import EventStorage, JSONWriter

from fpn_d2.engine import Trainer
from fpn_d2.engine.wandb_writer import WandbWriter

from .small import small_config

FAKE = """
class Run:
    def __init__(self, **options):
        self.options, self.logged, self.finished = options, [], False
    def log(self, values, step):
        self.logged.append((step, values))
    def finish(self):
        self.finished = True
def init(**options):
    return Run(**options)
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    yield
    sys.modules.pop("wandb", None)


def writers(cfg) -> list:
    trainer = object.__new__(Trainer)
    trainer.cfg, trainer.max_iter = cfg, 4
    return trainer.build_writers()


def test_only_who_asks_gets_it(wandb, tmp_path, scenes, monkeypatch):
    cfg = small_config(tmp_path, scenes, "MODEL.DEVICE", "cpu")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    assert [type(one) for one in writers(cfg) if isinstance(one, WandbWriter)] == []
    monkeypatch.setenv("WANDB_PROJECT", "cells")
    found = writers(cfg)
    assert any(isinstance(one, JSONWriter) for one in found) and isinstance(found[-1], WandbWriter)
    options = found[-1]._run.options
    assert options["project"] == "cells" and options["dir"] == cfg.OUTPUT_DIR
    assert options["config"]["MODEL"]["FPN"]["OUT_CHANNELS"] == 16
    for one in found:
        one.close()
    monkeypatch.syspath_prepend(tmp_path)  # not installed: nothing is said either
    (tmp_path / "lib" / "wandb.py").unlink()
    importlib.invalidate_caches()
    sys.modules.pop("wandb", None)
    assert not any(isinstance(one, WandbWriter) for one in writers(cfg))


def test_values_are_logged_once_at_their_iterations(wandb, tmp_path, scenes, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "cells")
    writer = WandbWriter(small_config(tmp_path, scenes, "MODEL.DEVICE", "cpu"))
    with EventStorage(5) as storage:
        storage.put_scalar("bbox/AP", 40.0, smoothing_hint=False)
        storage.iter = 7
        for value in (3.0, 1.0, 2.0):
            storage.put_scalar("total_loss", value)
        writer.write()
        writer.write()
        storage.iter = 8
        storage.put_scalar("lr", 0.1, smoothing_hint=False)
        writer.write()
    run = writer._run
    assert run.logged == [(5, {"bbox/AP": 40.0}), (7, {"total_loss": 2.0}), (8, {"lr": 0.1})]
    writer.close()
    assert run.finished
