"""Everything that docs/reliability.md claims, tried: faults, kills, bad data, fuzzing, soak; and its table written.

    python -m tests.reliability                   what is not yet there, then the table; 2 hours on 2 cores
    python -m tests.reliability --part kills      one part: faults, jobs, kills, messy, fuzz, soak
    python -m tests.reliability --table           the table alone, of what is there

Each step's result is kept in --folder as soon as it is there: a run that was stopped goes on where it was. A step that
ends badly is kept too, and is in the table.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from tests.marked import write_between

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- start of the table of tests.reliability -->", "<!-- end of the table of tests.reliability -->"
FUZZ_INPUTS, FUZZ_ROUNDS = 50_000, 5  # in one go; times four targets, a million
KILL_RUNS, KILLS = 11, 5
TARGETS = ("weights", "config", "coco", "voc")

Step = tuple[str, list[str]]  # name of the result, the command behind `python -m` that writes it with --json FILE


def steps_of_faults() -> Iterator[Step]:
    yield "faults", ["tests.fault_table"]


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
    "faults": steps_of_faults,
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


def table_of_faults(folder: Path) -> list[str]:
    """Kills, jobs, soak: what is tried many times, or what stock Detectron2 has not."""
    runs = [run for step in results("kills", folder) for run in step]
    lines = ["| fault | tried | what came of it |", "| --- | --- | --- |"]
    if runs:
        moments = [moment for run in runs for moment in run["moments"]]
        equal = sum(not run["wrong"] for run in runs)
        start_up = sum(m["iteration"] < 0 for m in moments)
        lines.append(
            f"| SIGKILL at a random moment, two workers, augmentation | {len(moments)} times in {len(runs)} trainings: "
            f"{start_up} in start-up, {sum(m['saving'] for m in moments)} while a checkpoint was written | "
            f"{equal} of {len(runs)} end with the weights, optimizer, trainer state and best checkpoint of one that "
            "was not touched, bit for bit |"
        )
    for lines_of_jobs in results("jobs", folder):
        for what, well in lines_of_jobs:
            trial, _, outcome = what.partition(": ")
            lines.append(f"| {trial} | once | {outcome if well else f'FAILS: {outcome}'} |")
    for soak in results("soak", folder):
        memory, files = soak["memory_kib"], soak["files"]
        lines.append(
            f"| nothing: a long run of a tiny model with two workers | {soak['iterations']:,} iterations | memory "
            f"{memory[0] / 1024:.0f} MiB, at the end {memory[1] / 1024:.0f}; open files {files[0]}, at the end "
            f"{files[1]}; {'flat' if soak['flat'] else 'NOT FLAT'} |"
        )
    return lines


def table_of_fuzzing(folder: Path) -> list[str]:
    lines = ["| target | inputs | read | refused | findings | slowest | memory |", "| --- " * 7 + "|"]
    counts = results("fuzz", folder)
    for target in TARGETS:
        own = [count for count in counts if count["target"] == target]
        if own:
            total = {key: sum(count[key] for count in own) for key in ("inputs", "read", "refused", "found")}
            lines.append(
                f"| {target} | {' | '.join(f'{n:,}' for n in total.values())} | "
                f"{max(c['slowest'] for c in own):.1f} s | {max(c['peak_mib'] for c in own)} MiB |"
            )
    inputs, found = (sum(count[key] for count in counts) for key in ("inputs", "found"))
    lines.append(f"| together | {inputs:,} | | | {found} | | |")
    return lines


def table_beside_stock(part: str, what: str, folder: Path) -> list[str]:
    rows = [row for step in results(part, folder) for row in step]
    head = [f"| {what} | stock Detectron2 | fpn_d2 |", "| --- | --- | --- |"]
    return [*head, *(f"| {' | '.join(row)} |" for row in rows)]


def summary_of_messy(folder: Path) -> str:
    """How the sets end, in numbers."""
    rows = [row for step in results("messy", folder) for row in step]

    def number(column: int, *words: str) -> int:
        return sum(row[column].startswith(words) for row in rows)

    silent = sum(row[1].endswith("says nothing") for row in rows)
    bad = ("traceback", "hangs", "dies")
    return (
        f"{len(rows)} sets. Stock Detectron2 ends with a traceback, dies or hangs on {number(1, *bad)} of them, and "
        f"says nothing of the fault on {silent}. fpn_d2 trains and evaluates on what is sound of "
        f"{number(2, 'trains')}, stops before training in one sentence on {number(2, 'stops')}, and ends with a "
        f"traceback, dies or hangs on {number(2, *bad)}."
    )


def versions() -> str:
    """What it was tried with, in one line."""
    names = ("torch", "torchvision", "detectron2", "numpy", "pillow", "pycocotools")
    found = [f"{name} {importlib.metadata.version(name)}" for name in names]
    return f"With {', '.join(found)}, Python {platform.python_version()}, on {os.cpu_count()} CPU cores."


def write_table(folder: Path) -> None:
    """Put what is there into the document."""
    parts = [
        ("### Faults, beside stock Detectron2", table_beside_stock("faults", "fault", folder)),
        ("### Faults that were tried many times, and processes", table_of_faults(folder)),
        ("### Inputs of the fuzzer", table_of_fuzzing(folder)),
        (f"### Sets with one fault each\n\n{summary_of_messy(folder)}", table_beside_stock("messy", "set", folder)),
    ]
    tables = [f"{title}\n\n" + "\n".join(lines) for title, lines in parts if len(lines) > 2]
    text = "\n\n".join([versions(), *tables])
    write_between(DOCUMENT, BEGIN, END, text)
    print(f"wrote {DOCUMENT}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--folder", type=Path, default=ROOT / "output" / "reliability", help="where results are kept")
    parser.add_argument("--table", action="store_true", help="write the table of what is there, and run nothing")
    args = parser.parse_args(arguments)
    if not args.table:
        run_steps(args.part, args.folder)
    write_table(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
