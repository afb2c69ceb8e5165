"""One line of the table of benchmarks: Detectron2's way and ours, checked against each other, then timed in turn."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..measure.peak import matrix_peak
from ..measure.timing import Call, Stopwatch, paired, spread

DETECTRON2 = "Detectron2"


@dataclass(frozen=True)
class Timing:
    """How a row is timed.

    Attributes:
        rounds: measured rounds of A B A B.
        warmup: rounds before them.
        progress: called behind each call with the number of calls that are done and that of all.
    """

    rounds: int = 10
    warmup: int = 2
    progress: Callable[[int, int], object] = lambda done, total: None


@dataclass(frozen=True)
class Check:
    """How far our result is from Detectron2's.

    Attributes:
        what: the result, in words.
        difference: the largest; None: there was nothing to subtract.
        allowed: the largest that counts as the same.
        unit: of the two.
        within: whether it counts as the same.
    """

    what: str
    difference: float | None
    allowed: float
    unit: str
    within: bool


@dataclass(frozen=True)
class Work:
    """What there is to multiply in what is timed, as Detectron2 does it.

    Attributes:
        macs: multiply-adds of convolutions and matrix products.
        dtype: of ours; Detectron2's are of float32.
    """

    macs: int
    dtype: torch.dtype = torch.float32

    def shares(self, found: Mapping[str, dict]) -> dict[str, float]:
        """By "theirs" and "own", the share of the machine's peak that the median of a :func:`line` comes to."""
        peaks = {"theirs": matrix_peak(torch.float32), "own": matrix_peak(self.dtype)}
        return {side: self.macs / found[side]["median"] / peak for side, peak in peaks.items()}


@dataclass(frozen=True)
class Ours:
    """One way of ours to do what is timed.

    Attributes:
        call: does it once.
        checks: of its result.
        note: what belongs beside the figures.
    """

    call: Call
    checks: Sequence[Check]
    note: str = ""


def map_check(what: str, theirs: Sequence[Tensor], ours: Sequence[Tensor], allowed: float) -> Check:
    """Compare tensors one by one.

    Args:
        what: what they are, in words.
        theirs: Detectron2's; each is a scale of its own.
        ours: as many.
        allowed: the largest difference, by the largest absolute value of Detectron2's tensor.
    """
    shapes = [[tuple(one.shape) for one in side] for side in (theirs, ours)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{what}: Detectron2's have the shapes {shapes[0]}, ours {shapes[1]}")
    worst = 0.0
    for a, b in zip(theirs, ours, strict=True):
        if a.numel() == 0:
            continue
        difference, scale = float((a.double() - b.double()).abs().max()), float(a.double().abs().max())
        relative = difference / scale if scale else (0.0 if difference == 0 else float("inf"))
        worst = relative if not relative <= worst else worst  # NaN is the worst, and stays so
        if worst != worst:
            break
    return Check(what, worst, allowed, "of the largest value", worst <= allowed)


def equal_check(what: str, theirs: Tensor, ours: Tensor, unit: str) -> Check:
    """Whether two tensors have the same values."""
    same_shape = theirs.shape == ours.shape
    difference = float((theirs - ours).abs().max()) if same_shape and theirs.numel() else (0.0 if same_shape else None)
    return Check(what, difference, 0.0, unit, torch.equal(theirs, ours))


def time_lines(
    stock: Call,
    ours: Mapping[str, Ours | str],
    timing: Timing,
    measure: Stopwatch | None = None,
    work: Work | None = None,
) -> list[dict]:
    """Time Detectron2's way and each of ours in turn, in this process.

    Args:
        stock: Detectron2's way.
        ours: ours by name; or why one cannot be measured here. One whose result is not Detectron2's is not timed.
        timing: how often.
        measure: times one call; by default with the clock on the wall.
        work: what there is to multiply, for the shares of the machine's peak; None: these are not told.

    Returns:
        For each of ``ours`` what :func:`line` gives, or its name and "not_measured": the reason.
    """
    lines: dict[str, dict] = {}
    for name, way in ours.items():
        if isinstance(way, str):
            lines[name] = {"ours": name, "not_measured": way}
        elif beyond := [check for check in way.checks if not check.within]:
            lines[name] = {"ours": name, "not_measured": f"the results differ: {show_checks(beyond)}"}
            lines[name]["checks"] = [asdict(check) for check in way.checks]
    calls = {DETECTRON2: stock} | {name: ours[name].call for name in ours if name not in lines}
    if len(calls) > 1:
        samples = time_in_turn(calls, timing, measure)
        for name in list(calls)[1:]:
            way = ours[name]
            lines[name] = line(name, samples[DETECTRON2], samples[name], "s", way.checks, way.note)
            if work is not None:
                lines[name]["of_peak"] = work.shares(lines[name])
    return [lines[name] for name in ours]


def time_in_turn(calls: Mapping[str, Call], timing: Timing, measure: Stopwatch | None = None) -> dict[str, list[float]]:
    """Seconds of each round of each call; see `timing.paired`."""
    total, done = (timing.rounds + timing.warmup) * len(calls), 0

    def after_call() -> None:
        nonlocal done
        done += 1
        timing.progress(done, total)

    return paired(calls, timing.rounds, timing.warmup, measure=measure, after_call=after_call)


def line(
    name: str,
    theirs: Sequence[float],
    ours: Sequence[float],
    unit: str,
    checks: Sequence[Check] = (),
    note: str = "",
    against: str = DETECTRON2,
) -> dict:
    """Summarise rounds of Detectron2's way and of ours.

    Args:
        name: of our way.
        theirs: what each round of Detectron2's took.
        ours: likewise; the two of a round are a pair.
        unit: "s", or "MB" of memory.
        checks: of the results.
        note: what belongs beside the figures.
        against: the name of Detectron2's way.

    Returns:
        "ratio": median, quartiles and number of the ratios of the pairs, Detectron2's by ours for times (how many times
        as fast we are) and ours by Detectron2's for memory (the share that we need); "theirs" and "own" likewise, in
        the unit.
    """
    pairs = list(zip(theirs, ours, strict=True))
    ratios = [b / a for a, b in pairs] if unit == "MB" else [a / b for a, b in pairs]
    return {
        "ours": name,
        "against": against,
        "unit": unit,
        "ratio": {**spread(ratios), "of_medians": _of_medians(theirs, ours, unit)},
        "theirs": spread(theirs),
        "own": spread(ours),
        "checks": [asdict(check) for check in checks],
        "note": note,
    }


def _of_medians(theirs: Sequence[float], ours: Sequence[float], unit: str) -> float:
    ratio = statistics.median(theirs) / statistics.median(ours)
    return 1 / ratio if unit == "MB" else ratio


def show_checks(checks: Sequence[Check]) -> str:
    """The checks in words, those that failed with what is allowed."""
    return ", ".join(_show_check(check) for check in checks)


def _show_check(check: Check) -> str:
    if check.within and check.difference == 0:
        return f"{check.what} equal"
    value = "cannot be subtracted" if check.difference is None else f"{check.difference:.2g} {check.unit}".rstrip()
    return f"{check.what} {value}" if check.within else f"{check.what} {value} ({check.allowed:g} is allowed)"
