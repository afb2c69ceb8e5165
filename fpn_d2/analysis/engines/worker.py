"""A detector in a process of its own: runs it once for every line of its input, and prints the seconds.

    python -m fpn_d2.analysis.engines.worker '{"engine": "openvino", "path": ..., ...}'
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fpn_d2.inference.export.engines import open_engine


def detector_of(task: dict) -> Callable[[], int]:
    """One inference, from pixels to detections, which returns how many those are.

    Args:
        task: "threads", and for an exported detector "engine", "path", "dtype" and "images", an .npz file with its two
            inputs; or for a model "config" (a path), "opts", "state" (a file with its weights), "optimize" (a data
            type, or "" for the model as it is), "size" and "batch".
    """
    torch.set_num_threads(task["threads"])
    if "engine" in task:
        run = open_engine(task["engine"], Path(task["path"]), threads=task["threads"], dtype=task["dtype"])
        inputs = np.load(task["images"])
        images, sizes = inputs["images"], inputs["image_sizes"]
        return lambda: int(run(images, sizes)["counts"].sum())

    from detectron2.modeling import build_model

    from fpn_d2.modeling import without_timm_weights

    from ..subjects import optimized, random_batch, read_config

    _, cfg = read_config(task["config"], task["opts"], "cpu")
    network = build_model(without_timm_weights(cfg)).eval()
    network.load_state_dict(torch.load(task["state"], weights_only=True))
    if task["optimize"]:
        network = optimized(network, task["optimize"])
    batch = random_batch(cfg, task["batch"], tuple(task["size"]))

    @torch.no_grad()
    def call() -> int:
        return sum(len(output["instances"]) for output in network(batch))

    return call


def main(task: dict) -> None:
    """Say that the detector is ready, then answer each line of the input."""
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what others print goes to the log
    detect = detector_of(task)
    print(json.dumps({"detections": detect()}), file=said)
    for _ in sys.stdin:
        start = time.perf_counter()
        detect()
        print(json.dumps({"seconds": time.perf_counter() - start}), file=said)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
