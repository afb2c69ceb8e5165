# ruff: noqa: B905
"""What every exported detector needs round it: images to its size, detections to their pixels; numpy and Pillow."""

import sys

import numpy as np
from PIL import Image, ImageOps
from runner_shapes import keypoints_of, pasted


class Runner:
    """Subclasses set ``info``, a dictionary, and have ``run(images, image_sizes)``, which gives arrays by name."""

    def __call__(self, images):
        """PIL images -> for each a dictionary: boxes (x0, y0, x1, y1) in its pixels, scores, classes; of a Mask R-CNN
        masks (R, height, width) bool, of a Keypoint R-CNN keypoints (R, K, 3): x, y in its pixels, score."""
        images = [ImageOps.exif_transpose(image).convert("RGB") for image in images]
        short, long = self.info["short_side"], self.info["long_side"]
        scales = [min(short / min(i.size), long / max(i.size)) if short else 1 for i in images]
        sizes = [[int(side * s + 0.5) for side in image.size] for image, s in zip(images, scales)]
        width, height = np.max(sizes, axis=0)
        batch = np.zeros((len(images), 3, height, width), np.uint8)
        for row, image, (w, h) in zip(batch, images, sizes):
            pixels = np.asarray(image.resize((w, h), Image.BILINEAR))
            row[:, :h, :w] = (pixels[..., ::-1] if self.info["channels"] == "BGR" else pixels).transpose(2, 0, 1)
        found = self.run(batch, np.array([[h, w] for w, h in sizes], np.int64))
        for i, (image, size) in enumerate(zip(images, sizes)):
            own = {name: value[i, : found["counts"][i]] for name, value in found.items() if name != "counts"}
            scale = np.divide(image.size, size).astype(np.float32)
            if "keypoint_maps" in own:
                own["keypoints"] = keypoints_of(own.pop("keypoint_maps"), own["boxes"]) * np.array([*scale, 1])
            own["boxes"] = own["boxes"] * np.tile(scale, 2)
            if "masks" in own:
                own["masks"] = pasted(own["masks"], own["boxes"], *image.size)
            yield own


def main(detector):
    for path in sys.argv[2:]:
        (found,) = detector([Image.open(path)])
        for box, score, number in zip(found["boxes"], found["scores"], found["classes"]):
            print(path, detector.info["classes"][number], f"{score:.3f}", *(f"{x:.1f}" for x in box))
