"""Everything that docs/reliability.md claims, tried: faults, kills, bad data, fuzzing, soak; and its table written.

    python -m tests.reliability                   what is not yet there, then the table; 2 hours on 2 cores
    python -m tests.reliability --part kills      one part: jobs, kills, messy, fuzz, soak
    python -m tests.reliability --table           the table alone, of what is there

Each step's result is kept in --folder as soon as it is there: a run that was stopped goes on where it was. A step that
ends badly is kept too, and is in the table.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "reliability.md"
START, END = "<!-- start of the table of tests.reliability -->\n", "<!-- end of the table of tests.reliability -->\n"
FUZZ_INPUTS, FUZZ_ROUNDS = 50_000, 5  # in one go; times four targets, a million
KILL_RUNS, KILLS = 11, 5
TARGETS = ("weights", "config", "coco", "voc")

Step = tuple[str, list[str]]  # name of the result, the command behind `python -m` that writes it with --json FILE


def steps_of_jobs() -> Iterator[Step]:
    yield "jobs", ["tests.jobs", "--namespaces"]


def steps_of_kills() -> Iterator[Step]:
    for run in range(KILL_RUNS):
        yield f"kills-{run}", ["tests.kills", "--runs", "1", "--kills", str(KILLS), "--seed", str(run)]


def steps_of_messy() -> Iterator[Step]:
    from tests.messy_data import CASES

    names = list(CASES)
    for k in range(0, len(names), 8):
        yield f"messy-{k // 8:02}", ["tests.messy_table", *names[k : k + 8]]


def steps_of_fuzz() -> Iterator[Step]:
    for number in range(FUZZ_ROUNDS):
        for target in TARGETS:
            options = ["--target", target, "--seed", str(number), "--inputs", str(FUZZ_INPUTS), "--minutes", "60"]
            yield f"fuzz-{target}-{number}", ["tests.fuzz", *options]


def steps_of_soak() -> Iterator[Step]:
    yield "soak", ["tests.soak"]


PARTS: dict[str, Callable[[], Iterator[Step]]] = {
    "jobs": steps_of_jobs,
    "kills": steps_of_kills,
    "messy": steps_of_messy,
    "fuzz": steps_of_fuzz,
    "soak": steps_of_soak,
}


def run_steps(parts: list[str], folder: Path) -> None:
    """Run the steps of ``parts`` whose results are not in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = [step for part in parts for step in PARTS[part]()]
    missing = [step for step in steps if not (folder / f"{step[0]}.json").exists()]
    with tqdm(missing, unit="step", initial=len(steps) - len(missing), total=len(steps), disable=None) as bar:
        for name, command in bar:
            bar.set_postfix_str(name)
            unfinished = folder / f"{name}.unfinished"
            with open(folder / f"{name}.txt", "w") as said:
                subprocess.run(
                    [sys.executable, "-m", *command, "--json", str(unfinished)],
                    cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                )  # fmt: skip
            if unfinished.exists():
                os.replace(unfinished, folder / f"{name}.json")
            else:
                print(f"{name} has no result: see {said.name}", file=sys.stderr)


def results(part: str, folder: Path) -> list:
    """What the steps of a part that have run have written."""
    files = [folder / f"{name}.json" for name, _ in PARTS[part]()]
    return [json.loads(file.read_text()) for file in files if file.exists()]
