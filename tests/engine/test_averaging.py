"""SOLVER.EMA_DECAY: the average is evaluated and saved, and a resumed training goes on to the bit."""

import pytest
import torch
from detectron2.engine import HookBase

import fpn_d2
from fpn_d2.engine import Trainer, UserError

from .small import small_config

EMA = ["SOLVER.EMA_DECAY", 0.9]
OPTS = ["DATASETS.TEST", "()", "TEST.BEST_METRIC", "", "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", 4]


class _Watch(HookBase):
    """The training's own weights after each iteration."""

    def __init__(self):
        self.weights = []

    def after_step(self):
        self.weights.append({name: p.detach().clone() for name, p in self.trainer.model.named_parameters()})


def _trained(folder, scenes, *opts, upto=4, resume=False):
    torch.manual_seed(0)
    trainer = Trainer(small_config(folder, scenes, *OPTS, *opts))
    watch = _Watch()
    trainer.register_hooks([watch])
    trainer.resume_or_load(resume=resume)
    trainer.max_iter = upto
    trainer.train()
    return trainer, watch.weights


def _file(folder, name="model_final"):
    return torch.load(folder / "out" / f"{name}.pth", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, scenes):
    """A training of four iterations in one go: its folder, and its weights after each."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, weights = _trained(folder, scenes, *EMA)
    return folder, weights, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def _average(weights, decay):
    """The definition, one iteration after the other, in float64."""
    average = {name: value.double() for name, value in weights[0].items()}
    for n, own in enumerate(weights[1:], start=1):
        keep = min(decay, (1 + n) / (10 + n))
        average = {name: keep * average[name] + (1 - keep) * value.double() for name, value in own.items()}
    return average


def test_the_average_is_that_of_its_definition_and_stays_in_the_model(whole):
    folder, weights, left = whole
    expected, saved = _average(weights, 0.9), _file(folder)["model"]
    for name, value in expected.items():
        torch.testing.assert_close(saved[name].double(), value, rtol=1e-5, atol=1e-7)
        assert torch.equal(saved[name], left[name])
    moved = max((saved[name] - value).abs().max() for name, value in weights[-1].items())
    assert moved > 1e-4  # it is not the last


def test_averaging_does_not_touch_the_training(whole, tmp_path, scenes):
    _, weights, _ = whole
    _, plain = _trained(tmp_path, scenes)
    for own, other in zip(weights, plain, strict=True):
        assert all(torch.equal(own[name], value) for name, value in other.items())


def test_a_resumed_training_is_the_same_to_the_bit(whole, tmp_path, scenes):
    folder, weights, _ = whole
    _trained(tmp_path, scenes, *EMA, upto=2)
    _, later = _trained(tmp_path, scenes, *EMA, resume=True)
    for own, other in zip(weights[2:], later, strict=True):
        assert all(torch.equal(own[name], value) for name, value in other.items())
    one, other = _file(folder), _file(tmp_path)
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    for name, value in one["trainer"]["hooks"]["WeightAveraging"]["trained"].items():
        assert torch.equal(value, other["trainer"]["hooks"]["WeightAveraging"]["trained"][name])


def test_what_is_evaluated_validated_and_loaded_is_the_average(tmp_path, scenes, monkeypatch):
    seen = []
    trainer = Trainer(
        small_config(tmp_path, scenes, *EMA, "SOLVER.MAX_ITER", 3, "TEST.EVAL_PERIOD", 2, "TEST.VAL_LOSS_PERIOD", 2)
    )
    watch = _Watch()
    trainer.register_hooks([watch])
    key = "roi_heads.box_predictor.cls_score.weight"

    def evaluate(cfg, model, evaluators=None):
        seen.append(model.state_dict()[key].clone())
        return {"bbox": {"AP": float(len(seen))}}

    monkeypatch.setattr(Trainer, "test", staticmethod(evaluate))
    monkeypatch.setattr(
        "fpn_d2.engine.hooks.validation_losses",
        lambda cfg, model: seen.append(model.state_dict()[key].clone()) or {"total_loss": 1.0},
    )
    trainer.train()
    for count, value in zip((2, 2, 3, 3), seen, strict=True):
        expected = _average(watch.weights[:count], 0.9)[key]
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
    last = {name: value.float() for name, value in _average(watch.weights, 0.9).items()}
    for name in ("model_best", "model_final"):
        torch.testing.assert_close(_file(tmp_path, name)["model"][key], last[key], rtol=1e-5, atol=1e-7)
    loaded = fpn_d2.load(tmp_path / "out" / "model_final.pth", device="cpu")
    torch.testing.assert_close(loaded.model.state_dict()[key], last[key], rtol=1e-5, atol=1e-7)


def test_switched_on_later_it_starts_from_there(tmp_path, scenes):
    _trained(tmp_path, scenes, upto=2)
    _, weights = _trained(tmp_path, scenes, *EMA, resume=True)
    saved = _file(tmp_path)["model"]
    for name, value in _average(weights, 0.9).items():
        torch.testing.assert_close(saved[name].double(), value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_bad_values(tmp_path, scenes, decay):
    with pytest.raises(UserError, match=f"SOLVER.EMA_DECAY is {decay}; expected at least 0 and less than 1"):
        Trainer(small_config(tmp_path, scenes, *OPTS, "SOLVER.EMA_DECAY", decay))
