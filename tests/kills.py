"""Kills trainings by SIGKILL at random moments, lets each go on with --resume, and compares how they end, bit for bit.

    python -m tests.kills --runs 10 --kills 5

One training that is not touched is the measure. It has two workers, augmentation, lying and upright images, evaluations
and a best checkpoint. Others are killed some times each: a random while after a random iteration has begun, or in the
start-up, or, one in four, as soon as a checkpoint is being written. Then they are let to their end.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from tqdm import tqdm

from fpn_d2.engine import Trainer, load_prepared, run
from fpn_d2.files import UNFINISHED

from .engine.small import MODEL
from .tiny import TINY

ITERATIONS = 12


def make_data(folder: Path, images: int = 11, sizes: tuple[int, int] = (40, 90)) -> None:
    """Noise of different sizes, some upright and some lying, with one to three boxes each, in COCO's format."""
    rng = np.random.default_rng(7)
    entries, annotations = [], []
    folder.mkdir(parents=True)
    for i in range(1, images + 1):
        width, height = (int(n) for n in rng.integers(*sizes, 2))
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        entries.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        for _ in range(int(rng.integers(1, 4))):
            x, y, w, h = (int(n) for n in rng.integers(8, 24, 4))
            box = {"bbox": [x - 8, y - 8, w, h], "area": w * h, "iscrowd": 0, "category_id": int(rng.integers(1, 3))}
            annotations.append({"id": len(annotations) + 1, "image_id": i, **box})
    categories = [{"id": 1, "name": "ant"}, {"id": 2, "name": "bee"}]
    content = {"info": {}, "images": entries, "annotations": annotations, "categories": categories}
    (folder / "set.json").write_text(json.dumps(content))


def write_config(folder: Path, data: Path, **solver: object) -> Path:
    """A small detector on the data of `make_data`, whose outputs go into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **MODEL,
        "MODEL": {**TINY, "ROI_HEADS": {**TINY["ROI_HEADS"], "SCORE_THRESH_TEST": 0.0}},
        "DATASETS": {
            "COCO_FORMAT": [["kills_set", str(data / "set.json"), str(data)]], "TRAIN": ["kills_set"],
            "TEST": ["kills_set"],
        },
        "INPUT": {**MODEL["INPUT"], "MIN_SIZE_TRAIN": [40, 48, 64], "VERTICAL_FLIP": True, "COLOR_JITTER": 0.2},
        "DATALOADER": {"NUM_WORKERS": 2},
        "SOLVER": {**MODEL["SOLVER"], "MAX_ITER": ITERATIONS, "CHECKPOINT_PERIOD": 3, **solver},
        "TEST": {"EVAL_PERIOD": 5, "VAL_LOSS_PERIOD": 7, "PICTURE_IMAGES": 0},
        "OUTPUT_DIR": str(folder),
    }
    path = folder / "given.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def train(config: Path, resume: bool, begun: "multiprocessing.Value", opts: tuple[str, ...] = ()) -> None:
    """What train_net.py does with one process; what it says goes into a file beside its outputs.

    Args:
        config: Of `write_config`.
        resume: Whether with --resume.
        begun: Becomes the number of the iteration that has begun.
        opts: More of the configuration.
    """
    before_step = Trainer.before_step

    def note(trainer: Trainer) -> None:
        begun.value = trainer.iter
        before_step(trainer)

    Trainer.before_step = note
    with open(config.parent / "said.txt", "a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        torch.set_num_threads(1)
        args = argparse.Namespace(resume=resume, eval_only=False, config_file="", opts=[])
        run(args, load_prepared(str(config), list(opts)))


def start(config: Path, resume: bool, opts: tuple[str, ...] = ()) -> tuple:
    """The same in a process that is forked off this one, since starting Python takes longer than the training.

    Returns:
        The process, and the iteration that has begun in it, which is -1 before the first one.
    """
    context = multiprocessing.get_context("fork")
    begun = context.Value("i", -1)
    process = context.Process(target=train, args=(config, resume, begun, opts))
    process.start()
    return process, begun


def digest(value: object) -> str:
    """A hash over all tensors, numbers and names in nested containers."""
    parts = hashlib.sha256()

    def add(part: object) -> None:
        if isinstance(part, torch.Tensor):
            parts.update(f"{part.dtype}{tuple(part.shape)}".encode())
            parts.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            for key, inner in part.items():
                parts.update(repr(key).encode())
                add(inner)
        elif isinstance(part, (list, tuple)):
            for inner in part:
                add(inner)
        else:
            parts.update(repr(part).encode())

    add(value)
    return parts.hexdigest()


def end_of(folder: Path) -> dict[str, str]:
    """Hashes of what a finished training has come to: weights, optimizer and the rest, and the best weights."""
    final = torch.load(folder / "model_final.pth", weights_only=True)
    best = torch.load(folder / "model_best.pth", weights_only=True)
    trainer = {key: value for key, value in final["trainer"].items() if key != "hooks_due"}
    return {
        "weights": digest(final["model"]),
        "trainer": digest(trainer),
        "best": digest([best["model"], best["iteration"]]),
    }


def kill_and_finish(config: Path, kills: int, rng: random.Random, opts: tuple[str, ...] = ()) -> list[dict]:
    """Kill a training at random moments, then let it end.

    Returns:
        For each kill the iteration that had begun (-1: the start-up), the number of iterations that had been saved,
        whether it hit the writing of a checkpoint, and whether the training had just ended by itself.
    """
    moments = []
    for count in range(kills):
        saved = _saved(config.parent)
        process, begun = start(config, count > 0, opts)
        if rng.random() < 0.25:
            while process.is_alive() and not _being_written(config.parent):
                pass  # it takes some milliseconds
        else:
            target = rng.randrange(saved - 1, ITERATIONS) if saved < ITERATIONS else -1
            while process.is_alive() and begun.value < target:
                time.sleep(0.002)
            # An iteration takes some hundredths of a second, the start about half a second.
            process.join(rng.random() * (0.1 if target >= saved else 1.0))
        process.kill()
        process.join()
        moments.append(
            {
                "iteration": begun.value,
                "saved": _saved(config.parent),
                "saving": bool(_being_written(config.parent)),
                "ended": process.exitcode == 0,
            }
        )
    process, _ = start(config, kills > 0, opts)
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the training ended with {process.exitcode}; see {config.parent}/said.txt")
    return moments


def _being_written(folder: Path) -> list[Path]:
    return list(folder.glob(f"*.pth{UNFINISHED}"))


def words(moment: dict) -> str:
    """A moment of `kill_and_finish` in a few words."""
    if moment["ended"]:
        return "at the end"
    at = f"in {moment['iteration']}" if moment["iteration"] >= 0 else "in start-up"
    return f"{at}{', saving' if moment['saving'] else ''} ({moment['saved']})"


def _saved(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return torch.load(folder / (folder / "last_checkpoint").read_text(), weights_only=True)["iteration"] + 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--kills", type=int, default=5, help="per run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="keeps what the trainings write")
    parser.add_argument("--json", type=Path, help="write what came of it into this file too")
    args = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    runs = []
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_data(folder / "data")
        reference = write_config(folder / "whole", folder / "data")
        kill_and_finish(reference, 0, rng)
        expected = end_of(reference.parent)
        for number in tqdm(range(args.runs), unit="run", disable=None):
            config = write_config(folder / f"run{number}", folder / "data")
            moments = kill_and_finish(config, args.kills, rng)
            found = end_of(config.parent)
            wrong = [key for key in expected if found[key] != expected[key]]
            runs.append({"moments": moments, "wrong": wrong})
            ends = f"other {', '.join(wrong)}" if wrong else "equal"
            print(f"run {number}: killed {', '.join(map(words, moments))}: {ends}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(runs))
    equal = sum(not run["wrong"] for run in runs)
    print(f"{args.runs * args.kills} kills in {args.runs} runs of {ITERATIONS} iterations: {equal} runs end equal")
    return 0 if equal == args.runs else 1


if __name__ == "__main__":
    sys.exit(main())
