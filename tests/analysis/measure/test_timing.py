"""Paired timing under a clock that the tests wind themselves: nothing here depends on how fast the machine is."""

import gc

import pytest

from fpn_d2.analysis.measure.timing import paired, spread, stopwatch, summarise
from fpn_d2.errors import UserError


class Clock:
    """Seconds that pass only in the calls; the names of the calls are kept in order."""

    def __init__(self):
        self.now = 100.0
        self.log = []

    def __call__(self) -> float:
        self.log.append("read")
        return self.now

    def work(self, name: str, durations: list[float]):
        durations = iter(durations)

        def call():
            self.log.append(name)
            self.now += next(durations)

        return call


def test_calls_run_in_turn_and_warm_up_does_not_count():
    clock = Clock()
    calls = {"A": clock.work("A", [9, 1, 2, 3]), "B": clock.work("B", [90, 10, 20, 30])}
    samples = paired(calls, rounds=3, warmup=1, clock=clock)
    assert samples == {"A": [1, 2, 3], "B": [10, 20, 30]}
    assert [entry for entry in clock.log if entry != "read"] == ["A", "B"] * 4


def test_waits_for_the_device_on_both_sides_of_a_call():
    clock = Clock()
    stopwatch(clock, sync=lambda: clock.log.append("sync"))(clock.work("A", [1]))
    assert clock.log == ["sync", "read", "A", "sync", "read"]


def test_time_spent_waiting_belongs_to_the_call():
    clock = Clock()
    pending = []

    def sync():
        clock.now += sum(pending)
        pending.clear()

    assert paired({"A": lambda: pending.append(5.0)}, 2, 0, clock=clock, sync=sync) == {"A": [5.0, 5.0]}


def test_progress_is_outside_what_is_timed():
    clock = Clock()

    def progress():
        clock.now += 1000

    assert paired({"A": clock.work("A", [1, 2])}, 2, 0, clock=clock, after_call=progress) == {"A": [1, 2]}


def test_a_stopwatch_of_ones_own():
    assert paired({"A": lambda: 3.5}, 1, 0, measure=lambda call: 2 * call()) == {"A": [7.0]}


def test_garbage_is_not_collected_meanwhile_and_is_afterwards():
    seen = []
    paired({"A": lambda: seen.append(gc.isenabled())}, 1, 0)
    assert seen == [False] and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        paired({"A": lambda: 1 / 0}, 1, 0)
    assert gc.isenabled()


@pytest.mark.parametrize(("calls", "rounds", "warmup"), [({}, 1, 0), ({"A": int}, 0, 0), ({"A": int}, 1, -1)])
def test_nothing_to_time_is_refused(calls, rounds, warmup):
    with pytest.raises(UserError, match="expected at least 1, 1 and 0"):
        paired(calls, rounds, warmup)


def test_spread():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "quartiles": [2.0, 4.0], "n": 5}
    assert spread([7.0]) == {"median": 7.0, "quartiles": [7.0, 7.0], "n": 1}
    with pytest.raises(ValueError, match="no values"):
        spread([])


def test_ratio_of_medians_and_of_pairs_are_two_things():
    # The third round was disturbed by something that slowed both.
    summary = summarise({"A": [1.0, 2.0, 50.0], "B": [2.0, 8.0, 150.0], "C": [1.0, 1.0, 25.0]})
    assert summary["seconds"]["A"] == {"median": 2.0, "quartiles": [1.5, 26.0], "n": 3}
    assert list(summary["times_as_fast"]) == ["B", "C"]
    assert summary["times_as_fast"]["B"] == {"ratio_of_medians": 4.0, "median": 3.0, "quartiles": [2.5, 3.5], "n": 3}
    assert summary["times_as_fast"]["C"]["median"] == 0.5
