"""What is timed, and the conditions under which it is: one image size and one batch size at a time."""

import copy
import itertools
from collections.abc import Callable, Sequence

import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import nn

from fpn_d2.engine.optimizer import build_optimizer
from fpn_d2.engine.precision import build_inner_trainer

from .compare_memory import peak_in_child, peak_on_gpu
from .compare_setup import Model, random_batch
from .timing import Call, Stopwatch, cuda_stopwatch, paired, stopwatch, summarise

TORCHVISION = "torchvision"
Size = tuple[int, int]


def watch_for(device: torch.device) -> Stopwatch:
    """CUDA events on a GPU, the processor's clock elsewhere."""
    return cuda_stopwatch(device) if device.type == "cuda" else stopwatch()


def inference_call(network: nn.Module, batch: list) -> Call:
    """One inference on ``batch``, from images to detections."""

    def call() -> object:
        with torch.no_grad():
            return network(batch)

    return call


def training_call(cfg: CfgNode, network: nn.Module, batch: list[dict]) -> Call:
    """One training step on ``batch`` as the trainer does it: forward, backward, optimizer, in SOLVER.AMP's precision.

    The learning rate is 0: the arithmetic is that of any other, and the model stays what it is.
    """
    optimizer = build_optimizer(cfg, network)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    network.train()
    trainer = build_inner_trainer(cfg, network, itertools.repeat(batch), optimizer)
    trainer.iter = 0

    def call() -> None:
        with EventStorage() as trainer.storage:
            trainer.run_step()

    return call


def time_inference(
    models: Sequence[Model],
    others: dict[str, nn.Module],
    size: Size,
    number: int,
    rounds: int,
    warmup: int,
    after_call: Callable[[], object],
) -> dict:
    """Time one inference of each model in turn.

    Args:
        models: ours and theirs.
        others: torchvision's detectors, by name.
        size: (height, width) of the images.
        number: of images in the batch.
        rounds: measured rounds.
        warmup: rounds before.
        after_call: called behind each.

    Returns:
        What `timing.summarise` gives, with "size", "batch", "images_per_second" and "detections_per_image".
    """
    calls = {model.label: inference_call(model.runner, random_batch(model.cfg, number, size)) for model in models}
    device = torch.device(models[0].cfg.MODEL.DEVICE)
    for name, network in others.items():
        calls[name] = inference_call(network, torchvision_images(models[0].cfg, number, size, device))
    detections = {name: _detections(call()) / number for name, call in calls.items()}
    summary = summarise(paired(calls, rounds, warmup, measure=watch_for(device), after_call=after_call))
    speeds = {name: number / seconds["median"] for name, seconds in summary["seconds"].items()}
    return {
        "size": list(size),
        "batch": number,
        **summary,
        "images_per_second": speeds,
        "detections_per_image": detections,
    }


def _detections(outputs: list[dict]) -> float:
    return float(
        sum(len(output.get("instances", output.get("proposals", output.get("boxes", ())))) for output in outputs)
    )


def time_training(
    models: Sequence[Model], size: Size, number: int, rounds: int, warmup: int, after_call: Callable[[], object]
) -> dict:
    """Time one training step of each model in turn; see :func:`time_inference`."""
    # Copies: an optimizer's state and statistics of norms are left behind with them.
    calls = {
        model.label: training_call(model.cfg, copy.deepcopy(model.network), random_batch(model.cfg, number, size))
        for model in models
    }
    device = torch.device(models[0].cfg.MODEL.DEVICE)
    summary = summarise(paired(calls, rounds, warmup, measure=watch_for(device), after_call=after_call))
    return {"size": list(size), "batch": number, **summary}


def peak_memory(model: Model, mode: str, size: Size, number: int, opts: list[str], weights: str, optimize: str) -> dict:
    """Peak of memory of one inference or training step: {"mb": number} or {"missing": why}.

    On a GPU that of PyTorch's tensors, here; on a CPU that of the process, in a fresh one.
    """
    device = torch.device(model.cfg.MODEL.DEVICE)
    if device.type == "cuda":
        batch = random_batch(model.cfg, number, size)
        if mode == "training":
            call = training_call(model.cfg, copy.deepcopy(model.network), batch)
        else:
            call = inference_call(model.runner, batch)
        peak: float | str = peak_on_gpu(call, device)
    else:
        peak = peak_in_child(
            {
                "config": model.path,
                "opts": opts,
                "weights": weights,
                "mode": mode,
                "size": size,
                "batch": number,
                "threads": torch.get_num_threads(),
                "optimize": optimize if mode == "inference" else "",
            }
        )
    return {"missing": peak} if isinstance(peak, str) else {"mb": peak}


def torchvision_detector(device: torch.device) -> nn.Module:
    """torchvision's ``fasterrcnn_resnet50_fpn`` with random weights, in evaluation mode, for COCO's 91 labels."""
    torch.manual_seed(0)
    network = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    with torch.no_grad():
        for name, norm in network.backbone.body.named_modules():
            if name.endswith("bn3"):  # as in compare_setup, for the same reason
                norm.weight.mul_(0.1)
    return network.eval().to(device)


def torchvision_images(cfg: CfgNode, number: int, size: Size, device: torch.device) -> list[torch.Tensor]:
    """The images of :func:`random_batch` as torchvision takes them."""
    return [(item["image"].float() / 255).to(device) for item in random_batch(cfg, number, size)]


def keep_size(network: nn.Module, size: Size) -> None:
    """Let torchvision's detector work on images of ``size`` as they are."""
    network.transform.min_size, network.transform.max_size = (min(size),), max(size)
