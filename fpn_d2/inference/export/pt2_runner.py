# ruff: noqa: B905
"""Detect objects with an exported file: python pt2_runner.py detector.pt2 image.jpg ...

Needs numpy, Pillow, PyTorch and torchvision (for its operations) alone.
"""

import json
import sys

import numpy as np
import torch
import torchvision  # noqa: F401  (registers nms and roi_align)
from PIL import Image, ImageOps


class Detector:
    def __init__(self, path):
        properties = {"metadata.json": ""}
        self.module = torch.export.load(path, extra_files=properties).module()
        self.info = json.loads(properties["metadata.json"])

    @torch.no_grad()
    def __call__(self, images):
        """PIL images -> for each a dictionary: boxes (x0, y0, x1, y1) in its pixels, scores, classes, perhaps masks."""
        images = [ImageOps.exif_transpose(image).convert("RGB") for image in images]
        short, long = self.info["short_side"], self.info["long_side"]
        scales = [min(short / min(i.size), long / max(i.size)) if short else 1 for i in images]
        sizes = [[int(side * s + 0.5) for side in image.size] for image, s in zip(images, scales)]
        width, height = np.max(sizes, axis=0)
        batch = np.zeros((len(images), 3, height, width), np.uint8)
        for row, image, (w, h) in zip(batch, images, sizes):
            pixels = np.asarray(image.resize((w, h), Image.BILINEAR))
            row[:, :h, :w] = (pixels[..., ::-1] if self.info["channels"] == "BGR" else pixels).transpose(2, 0, 1)
        outputs = self.module(torch.from_numpy(batch), torch.tensor([[h, w] for w, h in sizes]))
        found = dict(zip(("boxes", "scores", "classes", "counts", "masks"), (x.numpy() for x in outputs)))
        for i, (image, size) in enumerate(zip(images, sizes)):
            own = {name: value[i, : found["counts"][i]] for name, value in found.items() if name != "counts"}
            yield own | {"boxes": own["boxes"] * np.tile(np.divide(image.size, size), 2).astype(np.float32)}


if __name__ == "__main__":
    detector = Detector(sys.argv[1])
    for path in sys.argv[2:]:
        (found,) = detector([Image.open(path)])
        for box, score, number in zip(found["boxes"], found["scores"], found["classes"]):
            print(path, detector.info["classes"][number], f"{score:.3f}", *(f"{x:.1f}" for x in box))
