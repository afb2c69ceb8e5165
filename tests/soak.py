"""A long training of a tiny model: its memory, its open files and its processes have to stay as they are.

    python -m tests.soak                   10,000 iterations with two workers; about 15 minutes
    python -m tests.soak --iterations 400

With augmentation, periodic checkpoints of which two are kept, and evaluations. Every 50 iterations the program and its
workers are looked at. The first fifth is left out: caches fill, and the evaluation is met for the first time.
"""

import argparse
import contextlib
import json
import logging
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from detectron2.engine import HookBase

from fpn_d2.engine import Trainer, load_prepared
from fpn_d2.engine.signals import signals

from .kills import make_data, write_config

_EVERY = 50  # iterations between two looks
_RISE = 0.02  # of the memory after the first fifth, that the last fifth may have more


def long_config(folder: Path, data: Path, iterations: int) -> Path:
    """A detector that takes some hundredths of a second for an iteration."""
    path = write_config(folder, data)
    config = yaml.safe_load(path.read_text())
    config["INPUT"] |= {"MIN_SIZE_TRAIN": [32, 48], "MIN_SIZE_TEST": 32}
    config["SOLVER"] |= {"MAX_ITER": iterations, "CHECKPOINT_PERIOD": max(1, iterations // 50), "CHECKPOINT_KEEP": 2}
    config["TEST"] |= {"EVAL_PERIOD": max(1, iterations // 20), "VAL_LOSS_PERIOD": 0}
    path.write_text(yaml.safe_dump(config))
    return path


class Look(HookBase):
    """Counts, every so many iterations, what the program and its workers hold."""

    def __init__(self, every: int = _EVERY):
        self._every = every
        self.seen: list[dict] = []

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self._every == 0:
            self.seen.append(held())


def held() -> dict[str, int]:
    """Memory in KiB (proportional share of what is shared), open files and processes, of this one and its children."""
    children = [int(n) for n in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    memory = files = 0
    for process in (os.getpid(), *children):
        with contextlib.suppress(OSError):
            files += len(os.listdir(f"/proc/{process}/fd"))
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            memory += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return {"memory_kib": memory, "files": files, "processes": 1 + len(children)}


def judge(seen: list[dict]) -> dict:
    """First and last figures after the first fifth, and whether they are flat."""
    seen = seen[len(seen) // 5 :]
    part = max(1, len(seen) // 4)
    result: dict = {}
    for key in seen[0]:
        result[key] = [round(statistics.median(s[key] for s in few)) for few in (seen[:part], seen[-part:])]
    memory, files, processes = (result[key] for key in ("memory_kib", "files", "processes"))
    result["flat"] = memory[1] <= memory[0] * (1 + _RISE) and files[1] <= files[0] and processes[1] <= processes[0]
    return result


def soak(folder: Path, iterations: int, every: int = _EVERY) -> dict:
    """Train, and look."""
    make_data(folder / "data", images=40)
    cfg = load_prepared(str(long_config(folder / "run", folder / "data", iterations)))
    cfg.freeze()
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    trainer = Trainer(cfg)
    look = Look(every)
    trainer.register_hooks([look])
    trainer.resume_or_load(resume=False)
    with signals.installed():
        trainer.train()
    return {"iterations": iterations, **judge(look.seen)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument("--json", type=Path, help="write what came of it into this file too")
    args = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), args.iterations, min(_EVERY, args.iterations // 20))
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result))
    return 0 if result["flat"] else 1


if __name__ == "__main__":
    sys.exit(main())
