"""Several processes of one machine: what is shown when one fails, how all end, and signals."""

import os
import signal
import sys
import threading
import time

import pytest

from fpn_d2.engine import processes
from fpn_d2.engine.processes import run_processes, say


def _run(case, count=3):
    """Run ``case`` in some processes, forked since starting Python takes long; the status of the end."""
    names = [f"process {i}" for i in range(count)]
    with pytest.raises(SystemExit) as end:
        run_processes(case, [(i,) for i in range(count)], names, "fork")
    return end.value.code


def _listens_no_more(number=0):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def test_all_well_is_the_end(capfd):
    run_processes(int, [(1,), (2,)], ["process 0", "process 1"], "fork")
    assert capfd.readouterr() == ("", "")


def test_an_error_is_shown_once_with_its_process(capfd):
    def case(number):
        if number == 1:
            raise RuntimeError("here")
        time.sleep(0.5)
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")

    assert _run(case) == 1
    said = capfd.readouterr().err
    assert said.startswith("error in process 1: Traceback")
    assert said.count("Traceback") == said.count("RuntimeError: here") == 1
    assert "Lost" not in said


def test_a_killed_process_is_named_and_ends_even_those_that_do_not_listen(capfd, monkeypatch):
    monkeypatch.setattr(processes, "_AFTER_FAILURE", 0.5)
    assert _run(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == 2 else _listens_no_more()) == 1
    assert capfd.readouterr().err == (
        "error: process 2 was ended by SIGKILL, which the system sends when memory runs out; so all were ended\n"
    )


@pytest.mark.parametrize("who", [(0, 1, 2), (1,)])
def test_a_mistake_of_the_user_is_said_once(capfd, who):
    def case(number):
        time.sleep(1 if number in who else 60)  # until all have started, of which a fork takes a moment
        say("error: the user's mistake")
        sys.exit(2)

    assert _run(case) == 2
    assert capfd.readouterr().err == "error: the user's mistake\n"


def test_a_mistake_is_said_once_though_the_process_that_said_it_is_ended(capfd, monkeypatch):
    """By the one that started it, when another one was sooner to end by the same mistake."""
    monkeypatch.setattr(processes, "_AFTER_FAILURE", 0.5)

    def case(number):
        if number == 1:
            time.sleep(1)
        say("error: the user's mistake")
        if number != 1:
            _listens_no_more()
        sys.exit(2)

    assert _run(case) == 2
    assert capfd.readouterr().err == "error: the user's mistake\n"


def _tells(number):
    def told(*_):
        print(number, flush=True)
        sys.exit(143)

    signal.signal(signal.SIGTERM, told)
    if number == 1:
        time.sleep(0.5)
        sys.exit(143)
    time.sleep(60)


def test_a_stop_of_one_becomes_a_stop_of_all_with_its_status(capfd):
    assert _run(_tells) == 143
    said = capfd.readouterr()
    assert (sorted("".join(said.out.split())), said.err) == (["0", "2"], "")  # a line may come into another


@pytest.mark.parametrize("listens", [True, False])
def test_a_signal_is_handed_on(capfd, monkeypatch, listens):
    monkeypatch.setattr(processes, "_AFTER_STOP", 0.5)

    def case(number):
        if not listens:
            _listens_no_more()
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
        time.sleep(60)

    ctrl_c = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT if listens else signal.SIGTERM))
    ctrl_c.start()
    assert _run(case) == (130 if listens else 143)
    assert capfd.readouterr().err == ("" if listens else "Stopped. No checkpoint was saved.\n")


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("1", [processes._FOR_THE_FIRST])])
def test_under_torchrun_the_first_process_speaks_first(capfd, monkeypatch, rank, waits):
    """The others are ended by torchrun while they wait; a mistake that only one of them meets is said all the same."""
    waited = []
    monkeypatch.setattr(processes.time, "sleep", waited.append)
    for name, value in {"RANK": rank, "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    say("error: the user's mistake")
    assert (waited, capfd.readouterr().err) == (waits, "error: the user's mistake\n")
