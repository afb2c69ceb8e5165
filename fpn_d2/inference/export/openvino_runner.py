"""Detect objects with an exported file: python openvino_runner.py detector.xml image.jpg ...

Needs numpy, Pillow and openvino alone, and the files beside it.
"""

import json
import sys

import openvino
from runner_base import Runner, main


class Detector(Runner):
    def __init__(self, path):
        core = openvino.Core()
        model = core.read_model(path)
        self.info = json.loads(model.get_rt_info(["fpn_d2", "detector"]).value)
        # As it was compared; "bf16" is faster where the processor has it.
        self.compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(self, images, image_sizes):
        found = self.compiled({"images": images, "image_sizes": image_sizes})
        return {output.any_name: found[output] for output in self.compiled.outputs}


if __name__ == "__main__":
    main(Detector(sys.argv[1]))
