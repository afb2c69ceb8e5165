"""Which precision each setting trains in."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from fpn_d2.engine import Trainer, UserError, load_config
from fpn_d2.engine.precision import AutocastTrainer, WatchedTrainer, amp_dtype, autocast, build_inner_trainer

from .small import small_config


def _cfg(*opts):
    cfg = load_config("", [str(o) for o in opts])
    return cfg


class _Loss(nn.Module):
    """A linear layer that remembers in which data type its output and the gradient of its output came."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.forward_dtype = self.autocast_in_backward = None

    def forward(self, data):
        out = self.layer(torch.ones(2, 4))
        self.forward_dtype = out.dtype
        out.register_hook(self._on_gradient)
        return {"loss": out.float().square().mean()}

    def _on_gradient(self, gradient):
        self.autocast_in_backward = torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(("enabled", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_the_forward_pass_alone_is_under_autocast(enabled, dtype):
    cfg = _cfg("MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", enabled)
    model = _Loss()
    before = model.layer.weight.clone()
    trainer = build_inner_trainer(cfg, model, [0], torch.optim.SGD(model.parameters(), lr=0.1))
    with EventStorage():
        trainer.run_step()
    assert model.forward_dtype == dtype
    assert model.autocast_in_backward is False
    assert trainer.model is model
    assert model.layer.weight.dtype == torch.float32
    assert not torch.equal(model.layer.weight, before)


def test_the_model_is_itself_again_after_an_error():
    class Broken(_Loss):
        def forward(self, data):
            raise ArithmeticError

    model = Broken()
    cfg = _cfg("MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", True)
    trainer = build_inner_trainer(cfg, model, [0], torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ArithmeticError), EventStorage():
        trainer.run_step()
    assert trainer.model is model


@pytest.mark.parametrize(
    ("opts", "dtype"),
    [
        (["SOLVER.AMP.ENABLED", False, "MODEL.DEVICE", "cpu"], None),
        (["SOLVER.AMP.ENABLED", True, "MODEL.DEVICE", "cpu"], torch.bfloat16),
        (["SOLVER.AMP.ENABLED", True, "MODEL.DEVICE", "cpu", "SOLVER.AMP.DTYPE", "bfloat16"], torch.bfloat16),
    ],
)
def test_amp_dtype_on_a_cpu(opts, dtype):
    assert amp_dtype(_cfg(*opts)) == dtype


@pytest.mark.parametrize(("name", "dtype"), [("auto", torch.float16), ("bfloat16", torch.bfloat16)])
def test_amp_dtype_on_a_gpu(name, dtype):
    cfg = _cfg("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", name)
    cfg.MODEL.DEVICE = "cuda"  # after load_config, which knows whether there is one
    assert amp_dtype(cfg) == dtype


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_autocast_has_the_device_and_the_dtype_of_the_configuration(monkeypatch, device, name):
    """Each device type has a dtype of its own where none is given, float16 on a GPU."""
    cfg = _cfg("MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", name)
    cfg.MODEL.DEVICE = device
    if (device, name) == ("cpu", "float16"):
        return  # refused, see below
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda device_type, dtype=None: asked.append((device_type, dtype)))
    autocast(cfg)
    assert asked == [(device.split(":")[0], getattr(torch, name))]


def test_float16_on_a_cpu_is_refused():
    cfg = _cfg("MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16")
    with pytest.raises(UserError, match="float16 needs a GPU.*bfloat16"):
        amp_dtype(cfg)


@pytest.mark.parametrize("enabled", [False, True])
def test_the_detector_trains_in_both(tmp_path, scenes, enabled):
    cfg = small_config(tmp_path, scenes, "SOLVER.AMP.ENABLED", enabled, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 2)
    trainer = Trainer(cfg)
    assert type(trainer._trainer) is (AutocastTrainer if enabled else WatchedTrainer)
    seen = []
    trainer.model.backbone.register_forward_hook(lambda module, inputs, maps: seen.append(maps["p3"].dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16 if enabled else torch.float32}
