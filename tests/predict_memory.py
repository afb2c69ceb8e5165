"""Memory that ``fpn-d2 predict`` takes over many files, by hand: a quarter of an hour of processor time.

    python -m tests.predict_memory --files 1000 10000 100000

Each run is a process of its own, over a folder of so many links to one small image, with a detector of a few thousand
parameters, so that what memory there is beside PyTorch's belongs to the images. Prints a table.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.inference.test_export import CLASSES, SMALLEST, build, config

DETECTOR = SMALLEST | {
    "MODEL.MASK_ON": False,
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 5,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "TEST.DETECTIONS_PER_IMAGE": 2,
    "INPUT.MIN_SIZE_TEST": 32,
    "INPUT.MAX_SIZE_TEST": 32,
}


def peak(checkpoint: Path, images: Path, output: Path) -> tuple[float, float]:
    """Largest resident memory of a run in MB, and its seconds."""
    command = [sys.executable, "-W", "ignore", "-m", "fpn_d2.cli", "predict", str(checkpoint), str(images)]
    begin = time.monotonic()
    command += ["--output", str(output), "--device", "cpu", "--classes", *CLASSES]
    run = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(run.pid, 0)
    if status:
        sys.exit(f"fpn-d2 predict ended with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss / 1024, time.monotonic() - begin


def main() -> None:
    """Run, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, nargs="+", default=[1000, 10_000, 100_000])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save({"model": build(DETECTOR).state_dict()}, folder / "weights.pth")
        (folder / "config.yaml").write_text(config(DETECTOR).dump())
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "image.png")
        print("| files | largest resident memory, MB | lines written | again, all done: MB | images per second |")
        print("| ---: | ---: | ---: | ---: | ---: |")
        for count in args.files:
            images, output = folder / f"images{count}", folder / f"output{count}"
            images.mkdir()
            for number in range(count):
                os.symlink(folder / "image.png", images / f"{number:07}.png")
            first, seconds = peak(folder / "weights.pth", images, output)
            again, _ = peak(folder / "weights.pth", images, output)
            with open(output / "predictions.jsonl", "rb") as file:
                lines = sum(1 for _ in file)
            print(f"| {count} | {first:.0f} | {lines} | {again:.0f} | {count / seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
