"""What ``fpn-d2 doctor`` proposes, trained beside the configuration that it looked at, by hand: 2 hours on one core.

    python -m tests.doctor_gain --data bccd --output docs/looking_into_a_model.md    what is missing, then the table
    python -m tests.doctor_gain --table                                              the table of what is there

The detector of ``configs/own_data``, from scratch, for fewer iterations and on smaller images, is trained with three
seeds as it stands and with what ``fpn-d2 doctor --write`` writes for it, on the blood cells of docs/benchmarks.md and
on synthetic scenes. All that is kept in --folder is not done again: what was stopped goes on from its last checkpoint.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import yaml
from tqdm import tqdm

from fpn_d2.files import write_atomically
from tests.marked import write_between

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- trained: begin, written by tests/doctor_gain.py -->", "<!-- trained: end -->"
CONFIG = ROOT / "configs" / "own_data" / "faster_rcnn_R_18_FPN_from_scratch.yaml"
SEEDS, ITERATIONS = (0, 1, 2), 320
SHORT_SIDE = {"blood cells": 224, "scenes": 128}
SCENES = ["--train", "200", "--val", "100", "--image-size", "128", "--min-size", "6", "--max-size", "60"]
FILES = ("annotations/instances_train.json", "images/train", "annotations/instances_val.json", "images/val")


def configuration(folder: Path, data: Path, name: str) -> Path:
    """Write the configuration that stands for a user's own: ``CONFIG`` on the data set in the folder ``data``."""
    train, train_images, val, val_images = (str(data / file) for file in FILES)
    text = yaml.safe_dump(
        {
            "_BASE_": os.path.relpath(CONFIG, folder),
            "DATASETS": {
                "COCO_FORMAT": [["own_train", train, train_images], ["own_val", val, val_images]],
                "TRAIN": ["own_train"],
                "TEST": ["own_val"],
            },
            "INPUT": {"MIN_SIZE_TRAIN": [SHORT_SIDE[name]], "MIN_SIZE_TEST": SHORT_SIDE[name]},
            "SOLVER": {"MAX_ITER": ITERATIONS, "WARMUP_ITERS": 50, "CHECKPOINT_PERIOD": 80},
            "TEST": {"EVAL_PERIOD": 0},
        }
    )
    path = folder / "as_it_stands.yaml"
    write_atomically(str(path), text)
    return path


def call(log: Path, *command: str) -> None:
    """Run ``python -m command``, its words in ``log``; ends the program where it fails."""
    with open(log, "a") as said:
        done = subprocess.run([sys.executable, "-W", "ignore", "-m", *command], cwd=ROOT, stdout=said, stderr=said)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}, see {log}")


def proposed(config: Path) -> Path:
    """What the doctor writes for a configuration."""
    path = config.with_name("proposed.yaml")
    if not path.exists():
        call(config.with_name("doctor.txt"), "fpn_d2.cli", "doctor", str(config), "--write", str(path))
    return path


def train(config: Path, seed: int) -> None:
    """Train and evaluate, going on where it was stopped; keep the figures."""
    output = config.with_suffix("") / str(seed)
    output.mkdir(parents=True, exist_ok=True)
    options = ["SEED", str(seed), "OUTPUT_DIR", str(output), "SOLVER.MAX_ITER", str(ITERATIONS)]
    call(output / "said.txt", "fpn_d2.cli", "train", "--resume", "--config-file", str(config), *options)
    last = [line for line in map(json.loads, open(output / "metrics.json")) if "bbox/AP" in line][-1]
    figures = {key: value for key, value in last.items() if key.startswith("bbox/AP")}
    write_atomically(str(kept(config, seed)), json.dumps(figures))


def kept(config: Path, seed: int) -> Path:
    """Where the figures of a run are."""
    return config.with_name(f"{config.stem}_{seed}.json")


def table(configs: dict[str, list[Path]]) -> str:
    """The means over the seeds and their standard deviations, and what was proposed."""
    lines = ["| data | configuration | AP | AP50 | AP75 | AP small | seeds |", "| --- | --- | " + "---: | " * 5]
    lines[1] = "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    changes = []
    for name, paths in configs.items():
        for config in paths:
            runs = [json.loads(kept(config, seed).read_text()) for seed in SEEDS if kept(config, seed).exists()]
            if not runs:
                continue
            cells = []
            for key in ("AP", "AP50", "AP75", "APs"):
                values = [run[f"bbox/{key}"] for run in runs]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}")
            what = config.stem.replace("_", " ")
            lines.append(f"| {name} | {what} | {' | '.join(cells)} | {len(runs)} |")
        if paths[-1].exists():
            said = "\n".join(line for line in paths[-1].read_text().splitlines() if not line.startswith("_BASE_"))
            changes.append(f"Proposed for the {name}:\n\n```yaml\n{said}\n```")
    return "\n".join([*lines, "", "\n\n".join(changes)])


def main() -> None:
    """Train what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="DIR", type=Path, help="the blood cells, with annotations/ and images/")
    parser.add_argument("--folder", metavar="DIR", type=Path, default=Path("output/doctor_gain"))
    parser.add_argument("--output", metavar="PAGE", help="page whose table is written anew; none: print it")
    parser.add_argument("--table", action="store_true", help="the table alone, of what is kept")
    args = parser.parse_args()
    folders = {name: args.folder.absolute() / name.replace(" ", "_") for name in SHORT_SIDE}
    if not args.table:
        if args.data is None:
            parser.error("--data is needed: the folder of the blood cells")
        data = {"blood cells": args.data.absolute(), "scenes": folders["scenes"] / "data"}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        call(folders["scenes"] / "scenes.txt", "fpn_d2.cli", "scenes", "--output", str(data["scenes"]), *SCENES)
        runs = []
        for name, folder in folders.items():
            config = configuration(folder, data[name], name)
            runs += [(one, seed) for seed in SEEDS for one in (config, proposed(config))]
        missing = [run for run in runs if not kept(*run).exists()]
        with tqdm(missing, initial=len(runs) - len(missing), total=len(runs), unit="run", disable=None) as bar:
            for run in bar:
                train(*run)
    configs = {name: [folder / "as_it_stands.yaml", folder / "proposed.yaml"] for name, folder in folders.items()}
    if args.output:
        write_between(args.output, BEGIN, END, table(configs))
    else:
        print(table(configs))


if __name__ == "__main__":
    main()
