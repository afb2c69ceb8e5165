"""How processes find each other: signals while they wait, and what is left of those that are no more."""

import signal
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from fpn_d2.engine import meeting
from fpn_d2.engine.meeting import agree, store_of_torchrun, wait_for_the_others


@pytest.fixture
def server():
    return dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)


def client(server):
    return dist.TCPStore("127.0.0.1", server.port, None, False)


def agreed(server, processes, waits=()):
    """What each process hears; those of ``waits`` start some tenths of a second later."""
    heard = [None] * processes

    def process(rank):
        time.sleep(0.3 * (rank in waits))
        heard[rank] = agree(client(server), rank, processes, timedelta(seconds=20))

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


def test_processes_agree_on_a_new_name_after_each_restart(server):
    """Whoever comes last: the first process after a restart may find the words of all, and the others its old one."""
    names = []
    for waits in ((), (0,), (1,), (0, 2)):
        heard = agreed(server, 3, waits)
        assert len(set(heard)) == 1 and heard[0] not in names
        names.append(heard[0])


def test_one_process_alone_waits_for_none(server):
    assert agree(client(server), 0, 1, timedelta(seconds=5))


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_never_come_are_not_waited_for_without_end(server, rank):
    agreed(server, 2)  # they are gone
    with pytest.raises(RuntimeError, match="not all of the 2 processes"):
        agree(client(server), rank, 2, timedelta(seconds=0.2))


def test_a_store_of_torchruns_holds_nothing_of_an_attempt_before(server, monkeypatch):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
    for name, value in {**address, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        store = store_of_torchrun(0, 1, timedelta(seconds=5))
        assert store.add("starts", 1) == 1
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert store_of_torchrun(0, 1, timedelta(seconds=5)) is None


def test_a_signal_ends_the_wait_for_others(caplog, monkeypatch):
    monkeypatch.setattr(meeting, "_TELL_AFTER", 0.1)
    release = threading.Event()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sender = threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGTERM))
        sender.start()
        with pytest.raises(KeyboardInterrupt):
            wait_for_the_others(release.wait, "tcp://there:1")
    finally:
        signal.signal(signal.SIGTERM, before)
        release.set()
    assert "Waiting for the other processes of this job (tcp://there:1)" in caplog.text


def test_what_goes_wrong_in_the_wait_is_raised():
    def fail():
        raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        wait_for_the_others(fail, "")
