"""Detect objects with an exported file: python onnx_runner.py detector.onnx image.jpg ...

Needs numpy, Pillow and onnxruntime alone, and the files beside it.
"""

import json
import sys

import onnxruntime
from runner_base import Runner, main


class Detector(Runner):
    def __init__(self, path):
        self.session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
        properties = self.session.get_modelmeta().custom_metadata_map
        self.info = {key: json.loads(value) for key, value in properties.items()}
        self.names = [output.name for output in self.session.get_outputs()]

    def run(self, images, image_sizes):
        found = self.session.run(self.names, {"images": images, "image_sizes": image_sizes})
        return dict(zip(self.names, found, strict=True))


if __name__ == "__main__":
    main(Detector(sys.argv[1]))
