"""Detect objects with an exported file: python pt2_runner.py detector.pt2 image.jpg ...

Needs numpy, Pillow, PyTorch and torchvision (for its operations) alone, and the files beside it.
"""

import json
import sys

import torch
import torchvision  # noqa: F401  (registers nms and roi_align)
from runner_base import Runner, main


class Detector(Runner):
    def __init__(self, path):
        properties = {"metadata.json": ""}
        self.module = torch.export.load(path, extra_files=properties).module()
        self.info = json.loads(properties["metadata.json"])

    @torch.no_grad()
    def run(self, images, image_sizes):
        outputs = self.module(torch.from_numpy(images), torch.from_numpy(image_sizes))
        return {name: value.numpy() for name, value in zip(self.info["outputs"], outputs, strict=True)}


if __name__ == "__main__":
    main(Detector(sys.argv[1]))
