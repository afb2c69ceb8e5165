"""Peak of memory of one model, by which an inference or a training step raises it: the process that finds out.

    python -m fpn_d2.analysis.compare.memory_worker '{"config": ..., "mode": "inference", "result": ..., ...}'
"""

import json
import sys

import torch

from fpn_d2.files import write_atomically

from ..measure.memory import CALLS, raised_peak
from ..subjects import build_one, optimized, random_batch, read_config
from .measure import inference_call, training_call


def measure(task: dict) -> float | str:
    """Do in this process what ``task`` says, and return the peak.

    Args:
        task: "config" (a path), "opts", "weights", "mode" (of ``MODES``), "size", "batch", "threads", "optimize" (a
            data type, or "" for the model as it is).
    """
    torch.set_num_threads(task["threads"])
    path, cfg = read_config(task["config"], task["opts"], "cpu")
    model = build_one("A", task["config"], path, cfg, task["weights"])
    batch = random_batch(cfg, task["batch"], tuple(task["size"]))
    if task["mode"] == "training":
        call = training_call(cfg, model.network, batch)
    else:
        if task["optimize"]:
            model.runner = model.network = optimized(model.network, task["optimize"])
        call = inference_call(model.runner, batch)
    return raised_peak(lambda: [call() for _ in range(CALLS)])


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    write_atomically(given["result"], json.dumps({"peak": measure(given)}))
