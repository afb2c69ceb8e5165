"""Files of checkpoints: broken ones, half-written ones, the latest and the best."""

import os

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from fpn_d2.engine import ReportingCheckpointer, UserError


def _checkpointer(folder):
    return ReportingCheckpointer(nn.Linear(2, 2), str(folder))


@pytest.mark.parametrize("name", ["w.pth", "w.pkl"])
@pytest.mark.parametrize("kept", [0, 30, -30])
def test_a_truncated_file_is_named(tmp_path, name, kept):
    path = tmp_path / name
    torch.save({"model": nn.Linear(2, 2).state_dict()}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=f"{path} .*cannot be read as weights"):
        _checkpointer(tmp_path).load(str(path))


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "w.pth").write_text("<html>not found</html>")
    with pytest.raises(UserError, match="w.pth .*cannot be read as weights"):
        _checkpointer(tmp_path).load(str(tmp_path / "w.pth"))
    torch.save({"model": {}}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="empty.pth holds no weights"):
        _checkpointer(tmp_path).load(str(tmp_path / "empty.pth"))


def test_a_missing_file_is_named_with_its_neighbours(tmp_path):
    (tmp_path / "model_final.pth").touch()
    with pytest.raises(UserError, match=f"looked for {tmp_path}/model_fnal.pth .did you mean model_final.pth"):
        _checkpointer(tmp_path).load(str(tmp_path / "model_fnal.pth"))


@pytest.fixture
def as_on_main(monkeypatch):
    """What the inherited ``load`` is called with, by a checkpointer that seems to read options, as on main."""
    loaded = []
    monkeypatch.setattr(DetectionCheckpointer, "load", lambda self, path, *args, **kwargs: loaded.append(path) or {})
    monkeypatch.setattr(DetectionCheckpointer, "_parsed_url_during_load", None, raising=False)
    return loaded


def test_options_behind_a_file_reach_detectron2(tmp_path, as_on_main, monkeypatch):
    checkpointer = _checkpointer(tmp_path)
    checkpointer.save("model")
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (str(tmp_path), "~"):
        checkpointer.load(f"{folder}/model.pth?matching_heuristics=True")
        checkpointer.load(f"{folder}/model.pth")
    assert as_on_main == [f"{tmp_path}/model.pth?matching_heuristics=True", f"{tmp_path}/model.pth"] * 2
    with pytest.raises(UserError, match=f"looked for {tmp_path}/model_finl.pth .did you mean model.pth"):
        checkpointer.load(f"{tmp_path}/model_finl.pth?matching_heuristics=True")


def test_options_behind_a_file_do_what_they_say_or_are_refused(tmp_path):
    """With ``matching_heuristics`` the names in the file need be endings alone of those in the model."""
    torch.save({"weight": torch.eye(2), "bias": torch.ones(2)}, tmp_path / "w.pth")
    checkpointer = ReportingCheckpointer(nn.Sequential(nn.Linear(2, 2)), str(tmp_path))
    with_option = f"{tmp_path}/w.pth?matching_heuristics=True"
    if not hasattr(checkpointer, "_parsed_url_during_load"):
        with pytest.raises(UserError, match="only Detectron2's main branch reads options.* leave .matching_heuristics"):
            checkpointer.load(with_option)
        return
    checkpointer.load(with_option)
    assert torch.equal(checkpointer.model[0].weight, torch.eye(2))
    with pytest.raises(UserError, match="w.pth.*matching"):
        checkpointer.load(f"{tmp_path}/w.pth?matching=True")


def test_an_address_that_cannot_be_fetched_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="download the file yourself"):
        _checkpointer(tmp_path).load("catalog://ImageNetPretrained/none")


def test_no_file_means_random_weights_and_a_line(tmp_path, caplog):
    caplog.set_level("INFO")
    assert _checkpointer(tmp_path).load("") == {}
    assert "random weights" in caplog.text


def test_what_is_saved_loads_and_nothing_else_is_left(tmp_path):
    saved = _checkpointer(tmp_path)
    saved.save("model_0000001", iteration=1)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    loaded = _checkpointer(tmp_path)
    assert loaded.resume_or_load("", resume=True) == {"iteration": 1}
    assert torch.equal(loaded.model.weight, saved.model.weight)


def test_a_writing_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    checkpointer = _checkpointer(tmp_path)
    checkpointer.save("model", iteration=1)
    before = (tmp_path / "model.pth").read_bytes()

    def half(data, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(UserError, match="no space"):
        checkpointer.save("model", iteration=2)
    assert (tmp_path / "model.pth").read_bytes() == before
    assert (tmp_path / "last_checkpoint").read_text() == "model.pth"


def test_the_best_model_is_not_the_one_to_resume_from(tmp_path):
    checkpointer = _checkpointer(tmp_path)
    checkpointer.save("model_0000001")
    checkpointer.save("model_best")
    assert (tmp_path / "model_best.pth").is_file()
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")


def test_a_checkpoint_to_resume_from_must_fill_the_model(tmp_path):
    _checkpointer(tmp_path).save("model")
    other = ReportingCheckpointer(nn.Sequential(nn.Linear(2, 2)), str(tmp_path))
    with pytest.raises(UserError, match="none of its tensors"):
        other.resume_or_load("", resume=True)
    wider = ReportingCheckpointer(_Wider(), str(tmp_path))
    with pytest.raises(UserError, match="2 of 4 tensors of the model, and evaluating or resuming needs all"):
        wider.resume_or_load("", resume=True)


class _Wider(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.more = nn.Linear(2, 2)


def test_nothing_to_resume_from_is_said(tmp_path, caplog):
    _checkpointer(tmp_path).resume_or_load("", resume=True)
    assert f"no checkpoint in {tmp_path} to resume from" in caplog.text
