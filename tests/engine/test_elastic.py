"""Whether a training that torchrun has started again goes on from its own checkpoint."""

import os

import pytest

from fpn_d2.engine import elastic
from fpn_d2.engine.elastic import resumes


@pytest.fixture
def attempt(monkeypatch):
    def set_attempt(number):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))

    return set_attempt


def save(folder, monkeypatch, seconds):
    """A good checkpoint that is so much younger than the first attempt."""
    path = folder / "model_0000003.pth"
    path.write_bytes(b"weights")
    time = os.path.getmtime(folder / "first_attempt") + seconds
    os.utime(path, (time, time))
    monkeypatch.setattr(elastic, "newest_good", lambda folder: str(path))


@pytest.mark.parametrize("asked", [True, False])
def test_without_torchrun_it_is_as_asked(asked, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert resumes(asked, str(tmp_path)) is asked
    assert not os.listdir(tmp_path)


def test_what_was_asked_for_holds_under_torchrun(attempt, tmp_path):
    attempt(0)
    assert resumes(True, str(tmp_path)) is True and not os.listdir(tmp_path)
    assert resumes(False, "s3://bucket") is False


def test_the_first_attempt_starts_anew_and_the_next_goes_on(attempt, tmp_path, monkeypatch):
    attempt(0)
    assert resumes(False, str(tmp_path)) is False
    save(tmp_path, monkeypatch, 60)
    monkeypatch.setattr(elastic, "_torchrun", lambda: "another")
    assert resumes(False, str(tmp_path)) is False  # once more by hand: its own first attempt
    attempt(1)
    save(tmp_path, monkeypatch, 60)
    assert resumes(False, str(tmp_path)) is True


def test_a_checkpoint_of_an_older_training_is_left_alone(attempt, tmp_path, monkeypatch):
    attempt(0)
    resumes(False, str(tmp_path))
    attempt(1)
    save(tmp_path, monkeypatch, -60)
    assert resumes(False, str(tmp_path)) is False
    monkeypatch.setattr(elastic, "newest_good", lambda folder: None)
    assert resumes(False, str(tmp_path)) is False


def test_an_attempt_without_the_file_of_the_first_starts_anew(attempt, tmp_path, monkeypatch):
    attempt(2)
    monkeypatch.setattr(elastic, "newest_good", lambda folder: pytest.fail("there is no first attempt"))
    assert resumes(False, str(tmp_path)) is False and (tmp_path / "first_attempt").exists()


def test_a_restart_that_torchrun_does_not_count_goes_on(attempt, tmp_path, monkeypatch):
    """As when a machine comes or goes: one of the torchruns was there before, and the others become known."""
    attempt(0)
    monkeypatch.setattr(elastic, "_torchrun", lambda: "a 1 10")
    assert resumes(False, str(tmp_path)) is False
    first = tmp_path / "first_attempt"
    begun = os.path.getmtime(first) - 100
    os.utime(first, (begun, begun))
    save(tmp_path, monkeypatch, 60)
    for torchruns in (["a 1 10", "b 2 20"], ["c 3 30", "b 2 20"]):
        monkeypatch.setattr(elastic.comm, "all_gather", lambda value, t=torchruns: t if " " in str(value) else [value])
        assert resumes(False, str(tmp_path)) is True
        assert os.path.getmtime(first) == begun
    monkeypatch.setattr(elastic.comm, "all_gather", lambda value: ["d 4 40"] if " " in str(value) else [value])
    assert resumes(False, str(tmp_path)) is False and first.read_text() == "d 4 40"  # another job


def test_a_torchrun_is_told_by_its_machine_number_and_start():
    host, number, start = elastic._torchrun().rsplit(" ", 2)
    assert host and int(number) == os.getppid()
    if os.path.exists("/proc/self/stat"):
        assert int(start) > 0
