"""Going on with another optimizer, other settings, another precision, other frozen layers."""

import itertools

import pytest
import torch

from fpn_d2.engine import Trainer, UserError
from fpn_d2.engine.resume import put_rates

from .small import small_config

OPTS = ["DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", 4]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, scenes):
    """The folder of a training with SGD that has been stopped after two of four iterations."""
    folder = tmp_path_factory.mktemp("saved")
    trainer = Trainer(small_config(folder, scenes, *OPTS))
    trainer.resume_or_load(resume=False)
    trainer.max_iter = 2
    trainer.train()
    return folder


def _resumed(saved, scenes, *opts):
    trainer = Trainer(small_config(saved, scenes, *OPTS, "SOLVER.CHECKPOINT_PERIOD", 100, *opts))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    return trainer


def _memory(trainer):
    """What the optimizer remembers, by the name of the tensor."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    return {names[id(p)]: state for p, state in trainer.optimizer.state.items()}


def _checkpoint(saved):
    return torch.load(saved / "out" / (saved / "out" / "last_checkpoint").read_text(), weights_only=True)


@pytest.fixture(autouse=True)
def kept(saved):
    """Each test finds the folder as it was."""
    files = {path: path.read_bytes() for path in (saved / "out").iterdir() if path.is_file()}
    yield
    for path in (saved / "out").glob("*"):
        if path.is_file() and path not in files:
            path.unlink()
    for path, content in files.items():
        path.write_bytes(content)


def test_another_optimizer_starts_with_an_empty_memory_and_goes_on_with_the_rest(saved, scenes, caplog):
    trainer = _resumed(saved, scenes, "SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", "0.001")
    assert _memory(trainer) == {}
    assert "was another one (with momentum)" in caplog.text and "(with betas)" in caplog.text
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.001] * len(trainer.optimizer.param_groups)
    for name, value in _checkpoint(saved)["model"].items():
        assert torch.equal(value, trainer.model.state_dict()[name])
    trainer.train()
    assert {"exp_avg", "exp_avg_sq"} <= _memory(trainer)["roi_heads.box_predictor.cls_score.weight"].keys()
    # And back.
    trainer = _resumed_from_adamw(saved, scenes)
    assert _memory(trainer) == {}
    trainer.train()


def _resumed_from_adamw(saved, scenes):
    trainer = Trainer(small_config(saved, scenes, *OPTS, "SOLVER.MAX_ITER", 6))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 4
    return trainer


def test_settings_of_the_configuration_win_and_are_told(saved, scenes, caplog):
    trainer = _resumed(
        saved, scenes, "SOLVER.BASE_LR", "0.002", "SOLVER.MOMENTUM", "0.5", "SOLVER.WEIGHT_DECAY", "0.01"
    )
    group = trainer.optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.002, 0.5, 0.01)
    for words in ("initial_lr was 0.01", "momentum was 0.9", "weight_decay was "):
        assert words in caplog.text
    assert len(_memory(trainer)) > 50  # of SGD, it stays
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == 0.002


def test_the_same_settings_are_not_spoken_of(saved, scenes, caplog):
    trainer = _resumed(saved, scenes)
    assert not [record for record in caplog.records if record.name == "fpn_d2.engine.resume"]
    held = _checkpoint(saved)
    state = held["trainer"]["_trainer"]["optimizer"]["state"]
    memory = _memory(trainer)
    assert list(memory) == held["trainer"]["optimized"]
    for name, before in zip(held["trainer"]["optimized"], state.values(), strict=True):
        assert torch.equal(memory[name]["momentum_buffer"], before["momentum_buffer"])


def test_memory_is_found_by_name_where_groups_or_frozen_layers_are_others(saved, scenes, caplog):
    """Another weight decay of norms makes other groups, in which the tensors have other numbers."""
    held = _checkpoint(saved)["trainer"]
    before = dict(zip(held["optimized"], held["_trainer"]["optimizer"]["state"].values(), strict=True))
    trainer = _resumed(saved, scenes, "SOLVER.WEIGHT_DECAY_NORM", "0.5", "MODEL.BACKBONE.FREEZE_AT", 2)
    memory = _memory(trainer)
    assert 10 < len(memory) < len(before)
    assert not any(name.startswith(("backbone.bottom_up.stem", "backbone.bottom_up.res2")) for name in memory)
    for name, state in memory.items():
        assert torch.equal(state["momentum_buffer"], before[name]["momentum_buffer"]), name
    trainer.train()  # saves without the frozen ones
    again = Trainer(small_config(saved, scenes, *OPTS, "SOLVER.MAX_ITER", 6))
    again.resume_or_load(resume=True)
    assert "tensors that were frozen are trained now" in caplog.text
    again.train()


def test_without_names_another_number_of_tensors_is_refused(saved, scenes):
    path = saved / "out" / (saved / "out" / "last_checkpoint").read_text()
    held = _checkpoint(saved)
    del held["trainer"]["optimized"]  # as an older version, and Detectron2's main branch, save it
    torch.save(held, path)
    assert len(_memory(_resumed(saved, scenes))) > 50
    with pytest.raises(UserError, match="does not name them: resume with the MODEL.BACKBONE.FREEZE_AT"):
        _resumed(saved, scenes, "MODEL.BACKBONE.FREEZE_AT", 2)


def test_another_precision_goes_on_and_is_told(saved, scenes, caplog):
    trainer = _resumed(saved, scenes, "SOLVER.AMP.ENABLED", True)
    assert "was in float32 and goes on in bfloat16" in caplog.text
    trainer.train()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


class _Scaler:
    def __init__(self):
        self.loaded = []

    def load_state_dict(self, state):
        self.loaded.append(state)


@pytest.mark.parametrize(("scaler_now", "scaler_then"), list(itertools.product((False, True), repeat=2)))
def test_a_loss_scale_is_loaded_where_there_is_one_and_new_where_not(saved, scenes, scaler_now, scaler_then):
    trainer = Trainer(small_config(saved, scenes, *OPTS))
    if scaler_now:
        trainer._trainer.grad_scaler = _Scaler()
    path = saved / "out" / (saved / "out" / "last_checkpoint").read_text()
    held = _checkpoint(saved)
    if scaler_then:
        held["trainer"]["_trainer"]["grad_scaler"] = {"scale": 1024.0}
    torch.save(held, path)
    trainer.resume_or_load(resume=True)
    if scaler_now:
        assert trainer._trainer.grad_scaler.loaded == [{"scale": 1024.0}] * scaler_then


def test_new_rates_go_on_where_the_schedule_is():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda iteration: 0.5**iteration)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    put_rates(scheduler, [0.4])
    assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0] == pytest.approx(0.4 * 0.25)
