"""What a check has found: handed to started processes, and never mixed up by programs that share an environment."""

import json
import multiprocessing
import os
import subprocess
import sys

import pytest

from fpn_d2.data import remembered


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setenv("FPN_D2_CHECKED", "")  # so that it is put back
    monkeypatch.delenv("FPN_D2_CHECKED")
    monkeypatch.setattr(remembered, "_own", None)


def ask(name, state, send):
    before = os.environ["FPN_D2_CHECKED"]
    found = remembered.recall(name, state)
    remembered.remember("own", ("b",), 2)
    send.send((found, remembered.recall(name, state), before != os.environ["FPN_D2_CHECKED"]))


def asked(name, state):
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=ask, args=(name, state, send))
    process.start()
    answer = receive.recv()
    process.join()
    return answer


def test_a_started_process_takes_it_over_and_writes_a_file_of_its_own():
    remembered.remember("cells", ("a", 1), {"what": 1})
    path = os.environ["FPN_D2_CHECKED"]
    before = open(path).read()
    assert asked("cells", ("a", 1)) == ({"what": 1}, {"what": 1}, True)
    assert asked("cells", ("a", 2))[:2] == (None, None)  # another state
    assert open(path).read() == before and os.environ["FPN_D2_CHECKED"] == path
    remembered.remember("mice", (), 3)
    assert os.environ["FPN_D2_CHECKED"] == path and set(json.load(open(path))) == {"cells", "mice"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"cells": 1}', b"\xff"])
def test_a_spoilt_file_costs_another_check_and_no_more(tmp_path, monkeypatch, content):
    path = tmp_path / "checked.json"
    path.write_bytes(content)
    monkeypatch.setenv("FPN_D2_CHECKED", str(path))
    assert remembered.recall("cells", ()) is None
    remembered.remember("cells", (), 1)
    assert path.read_bytes() == content
    assert json.load(open(os.environ["FPN_D2_CHECKED"]))["cells"]["what"] == 1


def test_programs_of_one_environment_do_not_meet(tmp_path):
    """They wrote into one file, and read it while another one had emptied it."""
    path = tmp_path / "checked.json"
    path.write_text("{}")
    code = "from fpn_d2.data.remembered import remember\nfor n in range(300): remember(str(n), (), 'x' * 2000)"
    environment = {**os.environ, "FPN_D2_CHECKED": str(path)}
    programs = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [program.wait() for program in programs] == [0, 0]
    assert path.read_text() == "{}"
