"""The fuzzer itself, and a few hundred of its inputs to each target; longer runs are `python -m tests.fuzz`."""

import importlib.util
import random
import signal

import pytest

from fpn_d2.errors import UserError
from tests import fuzz
from tests.fuzz import TARGETS, Fuzz, changed


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_hundred_inputs_are_read_or_refused(name, tmp_path):
    if name in ("coco", "voc") and not importlib.util.find_spec("fpn_d2.data.check"):
        pytest.skip("no check of data")
    folder = tmp_path / "files"
    folder.mkdir()
    run = Fuzz(name, folder, tmp_path / "findings")
    seeds = run.target.seeds()
    for seed in seeds:
        run.one(seed)
    assert run.counts["read"] >= len(seeds) // 3
    rng = random.Random(1)
    for _ in range(300):
        run.one(changed(rng.choice(seeds), rng, run.target.words, seeds))
    assert run.counts["found"] == 0, next((tmp_path / "findings").glob("*.txt")).read_text()
    assert run.counts["read"] + run.counts["refused"] == 300 + len(seeds)


class _Target:
    def __init__(self, folder):
        pass

    def run(self, data):
        if data == b"hang":
            while True:
                pass
        if data == b"mistake":
            raise UserError("not so")
        if data == b"bug":
            raise KeyError("b")


def test_what_is_no_refusal_is_found_and_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(TARGETS, "mine", _Target)
    monkeypatch.setattr(fuzz, "_SECONDS", 1)
    run = Fuzz("mine", tmp_path, tmp_path / "findings")
    for data in (b"fine", b"mistake", b"bug", b"hang"):
        run.one(data)
    assert (run.counts["read"], run.counts["refused"], run.counts["found"]) == (1, 1, 2)
    assert sorted(path.read_bytes() for path in (tmp_path / "findings").glob("*.bin")) == [b"bug", b"hang"]
    assert "KeyError" in run.report() and "4 inputs" in run.report()
    assert signal.alarm(0) == 0
