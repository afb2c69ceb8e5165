"""What each key of the recipe for own data is worth: one table, of several seeds, made by one command.

    python -m tests.recipes --set cells bccd/train.json bccd/train bccd/val.json bccd/val     on a set of one's own
    python -m tests.recipes --scenes                                                          on synthetic scenes
    python -m tests.recipes --set ... --images 20 50 100 --only recipe "from scratch"          on fewer images
    python -m tests.recipes --set ... --hold 45               tested on so many of the images to train on, to choose by

Every row is the recipe with one change, trained and evaluated by train_net.py in a process of its own, once for each
seed. What has been measured is kept, a line each in --records, and not measured again; the table is made of what is
there of the same set with the same --opts.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from fpn_d2.data.scenes import make_scenes
from fpn_d2.errors import UserError, user_mistakes_end_the_program
from tests.marked import write_between

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "own_data/faster_rcnn_lite0_FPN.yaml"
FROM_SCRATCH = "own_data/faster_rcnn_R_18_FPN_from_scratch.yaml"
_SCENES = {"train": 300, "val": 100, "image_size": 320, "min_size": 16, "max_objects": 6, "seed": 3}
_FIGURES = ("AP", "AP50", "AP75")

# Row -> what is changed, on top of the recipe. The first is what the others are compared with.
VARIANTS: dict[str, list[object]] = {
    "recipe": [],
    "without averaged weights": ["SOLVER.EMA_DECAY", 0.0],
    "norms trained": ["MODEL.TIMM.NORM", ""],
    "without colour jitter": ["INPUT.COLOR_JITTER", 0.0],
    "large-scale jitter": ["INPUT.SCALE_JITTER", [0.5, 1.5]],
    "mosaic": ["INPUT.MOSAIC", 0.5],
    "pasted boxes": ["INPUT.COPY_PASTE", 0.5],
    "repeat factors": [
        *["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 0.5],
    ],
    "bottom-up a third as fast": ["SOLVER.BOTTOM_UP_LR_FACTOR", 0.3],
    "bottom-up a tenth as fast": ["SOLVER.BOTTOM_UP_LR_FACTOR", 0.1],
    "layer-wise decay": ["SOLVER.BOTTOM_UP_LAYER_DECAY", 0.85],
    "bottom-up frozen at first": ["SOLVER.BOTTOM_UP_FROZEN_ITERS", 200],
    "canonical size 112": ["MODEL.ROI_LEVEL_ASSIGN.CANONICAL_BOX_SIZE", 112],
    "stem and res2 frozen": ["MODEL.BACKBONE.FREEZE_AT", 2],
    "Cascade R-CNN": ["MODEL.ROI_HEADS.NAME", "FPNCascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True],
    "random weights": ["MODEL.TIMM.WEIGHTS", "", "MODEL.TIMM.NAME", "tf_efficientnet_lite0", "MODEL.TIMM.NORM", ""],
    "from scratch": [],  # the other recipe
}


def main(arguments: list[str] | None = None) -> int:
    """Train what is missing, print the table, and write it."""
    args = build_parser().parse_args(arguments)
    with user_mistakes_end_the_program():
        output, variants = Path(args.output), _chosen(args.only)
        data = _data(args, output)
        records = Path(args.records or output / "records.jsonl")
        tasks = [
            (variant, count, seed)
            for count in args.images or [0]
            for seed in range(1, args.seeds + 1)
            for variant in variants
        ]
        known = _known(records, args.name, args.opts)
        measured = {_place(record) for record in known}
        failed = []  # which are tried again the next time
        for variant, count, seed in tqdm(tasks, unit="run", disable=None):
            record = {"set": args.name, "opts": args.opts, "variant": variant, "images": count, "seed": seed}
            if _place(record) in measured:
                continue
            name = "_".join([args.name, str(count or "all"), variant.replace(" ", "-"), str(seed)])
            record |= measure(variant, _of_count(data, count, seed, output), seed, output / name, args.opts)
            if "failed" in record:
                failed.append(record)
            else:
                known.append(record)
                with open(records, "a") as file:
                    file.write(json.dumps(record) + "\n")
        text = table([*known, *failed])
        if args.write:
            begin, end = (f"<!-- recipes {args.name}: {word} -->" for word in ("begin", "end"))
            write_between(args.write, begin, end, text)
        print(text)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.recipes", description=__doc__.split("\n", 1)[0])
    data = parser.add_mutually_exclusive_group(required=True)
    words = ("NAME", "TRAIN_JSON", "TRAIN_IMAGES", "VAL_JSON", "VAL_IMAGES")
    data.add_argument("--set", nargs=5, metavar=words, help="a set in COCO format")
    data.add_argument("--scenes", action="store_true", help="synthetic scenes")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1, 2, ... (3)")
    parser.add_argument("--only", nargs="+", metavar="ROW", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--images", nargs="+", type=int, help="numbers of images to train on; without: all")
    parser.add_argument("--hold", type=int, metavar="N", help="test on N of the images to train on, not on others")
    parser.add_argument("--output", default="output/recipes", help="folder (output/recipes)")
    parser.add_argument("--records", metavar="FILE", help="what has been measured (records.jsonl in the folder)")
    parser.add_argument("--write", metavar="PAGE", help="write the table into this page, between its marks")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE for every row, at the end")
    return parser


def _known(records: Path, name: str, opts: list[str]) -> list[dict]:
    found = [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []
    return [record for record in found if record["set"] == name and record["opts"] == opts]


def _place(record: dict) -> tuple:
    return record["variant"], record["images"], record["seed"]


def _chosen(only: list[str] | None) -> list[str]:
    for name in only or ():
        if name not in VARIANTS:
            raise UserError(f"--only {name!r} is no row; there are {', '.join(VARIANTS)}")
    return [name for name in VARIANTS if not only or name in only]


def _data(args: argparse.Namespace, output: Path) -> list[list[str]]:
    """[json, images] for training and for evaluation; sets ``args.name``."""
    output.mkdir(parents=True, exist_ok=True)
    if args.scenes:
        args.name, folder = "scenes", output / "scenes"
        if not folder.exists():
            make_scenes(folder, **_SCENES)
        return [[f"{folder}/annotations/instances_{s}.json", f"{folder}/images/{s}"] for s in ("train", "val")]
    args.name, *paths = args.set
    if not args.hold:
        return [paths[:2], paths[2:]]
    args.name += f"_hold_{args.hold}"
    with open(paths[0]) as file:
        content = json.load(file)
    ids = sorted(image["id"] for image in content["images"])
    if not 0 < args.hold < len(ids):
        raise UserError(f"--hold {args.hold} is not between 0 and the {len(ids)} images of {paths[0]}")
    random.Random(0).shuffle(ids)
    parts = {"train": ids[: -args.hold], "val": ids[-args.hold :]}
    return [[str(_part(content, part, output / f"{args.name}_{name}.json")), paths[1]] for name, part in parts.items()]


def _part(content: dict, ids: Iterable[int], path: Path) -> Path:
    """Write the images with these ids, and what is annotated in them."""
    ids = set(ids)
    images = [image for image in content["images"] if image["id"] in ids]
    annotations = [one for one in content["annotations"] if one["image_id"] in ids]
    path.write_text(json.dumps({**content, "images": images, "annotations": annotations}))
    return path


def _of_count(data: list[list[str]], count: int, seed: int, output: Path) -> list[list[str]]:
    """The same data with ``count`` images to train on, drawn by ``seed``; 0: all."""
    if not count:
        return data
    with open(data[0][0]) as file:
        content = json.load(file)
    if count > len(content["images"]):
        raise UserError(f"--images {count} are more than the {len(content['images'])} of {data[0][0]}")
    kept = random.Random(seed).sample([image["id"] for image in content["images"]], count)
    return [[str(_part(content, kept, output / f"train_{count}_{seed}.json")), data[0][1]], data[1]]


def measure(variant: str, data: list[list[str]], seed: int, folder: Path, opts: list[str]) -> dict:
    """Train a row with a seed, and read the last evaluation: {"AP": ..., "minutes": ...}, or {"failed": why}."""
    sets = [["recipe_train", *data[0]], ["recipe_val", *data[1]]]
    keys = ["DATASETS.COCO_FORMAT", sets, "DATASETS.TRAIN", ["recipe_train"], "DATASETS.TEST", ["recipe_val"]]
    keys += ["TEST.EVAL_PERIOD", 0, "TEST.PICTURE_IMAGES", 0, "OUTPUT_DIR", folder, "SEED", seed]
    config = FROM_SCRATCH if variant == "from scratch" else RECIPE
    words = [str(word) for word in [*keys, *opts, *VARIANTS[variant]]]
    words = [word or "''" for word in words]
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(ROOT / "configs" / config), *words]
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(folder / "output.txt", "w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    minutes = (time.monotonic() - start) / 60
    if code:
        last = (folder / "output.txt").read_text().strip().splitlines()[-1:]
        return {"failed": last[0] if last else f"status {code}"}
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    final = next(line for line in reversed(lines) if "bbox/AP" in line)
    for checkpoint in folder.glob("*.pth"):
        checkpoint.unlink()  # tens of megabytes a row, which nothing reads again
    return {figure: final[f"bbox/{figure}"] for figure in _FIGURES} | {"minutes": minutes}


def table(records: Iterable[dict]) -> str:
    """Markdown: mean and standard deviation over the seeds, and the gain over the first row with the same seeds."""
    records = list(records)
    lines = [
        "| images | row | seeds | AP | AP50 | AP75 | gain in AP, seed by seed | minutes |",
        "| ---: | --- | --- | --- | --- | --- | --- | ---: |",
    ]
    for count in sorted({record["images"] for record in records}, key=lambda n: n or float("inf")):
        of_count = [record for record in records if record["images"] == count]
        first = {r["seed"]: r["AP"] for r in of_count if r["variant"] == next(iter(VARIANTS)) and "AP" in r}
        for variant in VARIANTS:
            rows = sorted((r for r in of_count if r["variant"] == variant), key=lambda r: r["seed"])
            done = [r for r in rows if "AP" in r]
            if done:
                gains = [r["AP"] - first[r["seed"]] for r in done if r["seed"] in first and variant != "recipe"]
                figures = [_spread([r[figure] for r in done]) for figure in _FIGURES]
                seeds = ", ".join(str(r["seed"]) for r in done)
                minutes = f"{statistics.mean(r['minutes'] for r in done):.0f}"
                cells = [str(count or "all"), variant, seeds, *figures, _spread(gains, "+") if gains else "", minutes]
                lines.append(f"| {' | '.join(cells)} |")
            failed = [r for r in rows if "AP" not in r]
            lines += [f"| {count or 'all'} | {variant} | {r['seed']} | failed: {r['failed']} |" for r in failed]
    return "\n".join(lines) + "\n"


def _spread(values: list[float], sign: str = "") -> str:
    """Mean and standard deviation of a sample; of a single value that alone."""
    mean = f"{statistics.mean(values):{sign}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


if __name__ == "__main__":
    sys.exit(main())
