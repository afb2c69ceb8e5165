"""Times of several calls in turn, A B A B, and what is said about them: medians, quartiles, ratios.

In turn, because a shared machine is slow for seconds at a time: what disturbs A then disturbs the B beside it as well,
and the ratio of each pair holds where the times themselves do not.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from fpn_d2.errors import UserError

Call = Callable[[], object]
# Runs a call and returns the seconds that it took.
Stopwatch = Callable[[Call], float]


def stopwatch(clock: Callable[[], float] = time.perf_counter, sync: Callable[[], object] | None = None) -> Stopwatch:
    """A stopwatch that reads ``clock`` (seconds) before and after the call.

    Args:
        clock: seconds from any start.
        sync: called before the first reading and before the second: waits until a GPU has done what it was given.
    """

    def measure(call: Call) -> float:
        if sync:
            sync()
        start = clock()
        call()
        if sync:
            sync()
        return clock() - start

    return measure


def cuda_stopwatch(device: torch.device) -> Stopwatch:
    """A stopwatch of CUDA events on ``device``'s current stream: the time on the GPU from first to last."""

    def measure(call: Call) -> float:
        torch.cuda.synchronize(device)
        stream = torch.cuda.current_stream(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1000  # milliseconds

    return measure


def paired(
    calls: Mapping[str, Call],
    rounds: int,
    warmup: int = 2,
    *,
    measure: Stopwatch | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sync: Callable[[], object] | None = None,
    after_call: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Time ``calls`` in turn: one of each per round, always in the same order.

    Args:
        calls: what is timed, by name.
        rounds: measured rounds; at least 1.
        warmup: rounds before them that are thrown away.
        measure: times one call; by default with ``clock`` and ``sync``, see :func:`stopwatch`.
        clock: see there.
        sync: see there.
        after_call: called behind each call, outside what is timed: a progress bar.

    Returns:
        Seconds of each round, by name.

    Raises:
        UserError: there is nothing to call, or no round, or a negative number of warm-up rounds.
    """
    if not calls or rounds < 1 or warmup < 0:
        raise UserError(
            f"got {len(calls)} calls, {rounds} rounds, {warmup} warm-up rounds; expected at least 1, 1 and 0 of them"
        )
    measure = measure or stopwatch(clock, sync)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with _no_garbage_collection():
        for number in range(warmup + rounds):
            for name, call in calls.items():
                seconds = measure(call)
                if number >= warmup:
                    samples[name].append(seconds)
                if after_call:
                    after_call()
    return samples


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect now rather than within a call that happens to fill the last place."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def spread(values: Sequence[float]) -> dict:
    """Median, quartiles (between the values, as ``statistics.quantiles`` has it for a whole population) and number."""
    if not values:
        raise ValueError("got no values; expected at least one")
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
    return {"median": median, "quartiles": [low, high], "n": len(values)}


def summarise(samples: Mapping[str, Sequence[float]]) -> dict:
    """Summarise what :func:`paired` returned.

    Returns:
        "seconds": {name: median, quartiles, n}, and "times_as_fast": for each name but the first how many times as fast
        the first is: "ratio_of_medians", and "median" and "quartiles" of the ratios of the pairs.
    """
    first, *others = samples
    ratios = {}
    for other in others:
        pairs = [b / a for a, b in zip(samples[first], samples[other], strict=True)]
        medians = statistics.median(samples[other]) / statistics.median(samples[first])
        ratios[other] = {"ratio_of_medians": medians, **spread(pairs)}
    return {"seconds": {name: spread(values) for name, values in samples.items()}, "times_as_fast": ratios}
