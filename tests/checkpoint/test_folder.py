"""The folder of a training's checkpoints: damaged, missing, unfinished and superfluous files; disks that are full."""

import os
import random

import pytest
import torch

from fpn_d2.checkpoint.folder import (
    damage,
    newest_good,
    prune,
    remove_unfinished,
    write_checkpoint,
)
from fpn_d2.checkpoint.reading import read_checkpoint
from fpn_d2.errors import UserError
from fpn_d2.files import UNFINISHED


def _save(folder, name, last=True, value=1.0):
    path = str(folder / name)
    write_checkpoint({"model": {"w": torch.full((500,), value)}, "iteration": 3}, path)
    os.utime(path, ns=(len(os.listdir(folder)) * 10**9,) * 2)  # the files have an order in time
    if last:
        (folder / "last_checkpoint").write_text(name)
    return path


def _flip(path, place):
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0xFF]))


def test_flipped_bytes_are_found_wherever_they_change_anything(tmp_path):
    path = _save(tmp_path, "model_0000001.pth")
    whole = open(path, "rb").read()
    assert damage(path) == ""
    places = random.Random(0).sample(range(len(whole)), 150)
    found = 0
    for place in places:
        _flip(path, place)
        if damage(path):
            found += 1
        else:  # padding, times of day: it loads as before
            loaded = read_checkpoint(path)
            assert loaded["iteration"] == 3 and torch.equal(loaded["model"]["w"], torch.ones(500))
        _flip(path, place)
    assert open(path, "rb").read() == whole
    assert found > 50


def test_a_file_that_was_cut_off_or_is_empty_is_damaged(tmp_path):
    path = _save(tmp_path, "model_0000001.pth")
    whole = open(path, "rb").read()
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "model_0000001.pth").write_bytes(whole[:length])
        assert damage(path)


def test_the_newest_good_one_is_found(tmp_path, caplog):
    first, best, third, last = (_save(tmp_path, f"model_{n}.pth") for n in ("0000001", "best", "0000003", "0000005"))
    _save(tmp_path, "somebody_elses.pth", last=False)
    assert newest_good(str(tmp_path)) == last and not caplog.records
    _flip(last, 2000)
    assert newest_good(str(tmp_path)) == third
    assert last in caplog.text and f"going on from {third}" in caplog.text
    os.remove(third)
    assert newest_good(str(tmp_path)) == best
    os.remove(best)
    os.remove(last)
    assert newest_good(str(tmp_path)) == first
    assert f"{tmp_path} has no model_0000005.pth, which last_checkpoint names: going on from {first}" in caplog.text
    for content in (b"", b"\xff\xfe", b"../../elsewhere.pth", b"x" * 9999):
        (tmp_path / "last_checkpoint").write_bytes(content)
        assert newest_good(str(tmp_path)) == first
    os.remove(tmp_path / "last_checkpoint")
    assert newest_good(str(tmp_path)) == first


def test_an_older_one_that_is_named_is_taken(tmp_path):
    older, _ = _save(tmp_path, "model_0000001.pth"), _save(tmp_path, "model_0000003.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    assert newest_good(str(tmp_path)) == older


def test_nothing_good_is_not_nothing(tmp_path):
    assert newest_good(str(tmp_path)) == newest_good(str(tmp_path / "nowhere")) == ""
    os.truncate(_save(tmp_path, "model_0000001.pth"), 100)
    with pytest.raises(UserError, match=f"no checkpoint in {tmp_path} can be used: .* start without --resume"):
        newest_good(str(tmp_path))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no file that is always full")
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path):
    path = _save(tmp_path, "model_0000001.pth")
    before = open(path, "rb").read()
    os.symlink("/dev/full", path + UNFINISHED)
    with pytest.raises(UserError, match=f"cannot save {path}: No space left on device; before.pth is as it was"):
        write_checkpoint({"model": {"w": torch.zeros(10**6)}}, path, "before.pth")
    assert open(path, "rb").read() == before
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]


def test_an_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def half(data, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint({}, str(tmp_path / "model.pth"))
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    for name in ("model_final.pth.unfinished", "model_final.pth", "notes.unfinished"):
        (tmp_path / name).touch()
    remove_unfinished(str(tmp_path))
    remove_unfinished(str(tmp_path / "nowhere"))
    assert sorted(os.listdir(tmp_path)) == ["model_final.pth", "notes.unfinished"]


def test_pruning_keeps_the_newest_and_what_has_a_name(tmp_path):
    names = ["model_0000001.pth", "model_0000003.pth", "model_0000005.pth", "model_0000099.pth"]
    for name in [*names, "model_best.pth", "model_final.pth", "mine_0000001.pth"]:
        (tmp_path / name).touch()
    prune(str(tmp_path), 0, str(tmp_path / names[2]))
    prune(str(tmp_path), 2, str(tmp_path / "model_final.pth"))
    assert len(os.listdir(tmp_path)) == 7
    prune(str(tmp_path), 2, str(tmp_path / names[2]))  # 99 is of another run: later than the one just saved
    assert sorted(os.listdir(tmp_path)) == ["mine_0000001.pth", *names[1:], "model_best.pth", "model_final.pth"]
