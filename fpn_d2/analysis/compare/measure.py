"""What is timed, and the conditions under which it is: one image size and one batch size at a time."""

import copy
import itertools
from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.misc import FrozenBatchNorm2d

from fpn_d2.engine.optimizer import build_optimizer
from fpn_d2.engine.precision import build_inner_trainer

from ..measure.memory import peak_in_child, peak_on_gpu
from ..measure.timing import Call, Stopwatch, cuda_stopwatch, paired, stopwatch, summarise
from ..subjects import Model, number_of_classes, random_batch

MEMORY_WORKER = "fpn_d2.analysis.compare.memory_worker"  # it imports this file
TORCHVISION = "torchvision"
_LABELS = 91  # of COCO, with those that are not used
Size = tuple[int, int]


def watch_for(device: torch.device) -> Stopwatch:
    """CUDA events on a GPU, the processor's clock elsewhere."""
    return cuda_stopwatch(device) if device.type == "cuda" else stopwatch()


def inference_call(network: Callable[[list], object], batch: list) -> Call:
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
        calls[name] = inference_call(
            lambda batch, network=network: network(torchvision_images(batch, device)),
            random_batch(models[0].cfg, number, size),
        )
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
            MEMORY_WORKER,
            {
                "config": model.path,
                "opts": [*opts, *number_of_classes(model.cfg)],
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
    """torchvision's Faster R-CNN with ResNet-50 and FPN, random weights, in evaluation mode, for COCO's 91 labels."""
    torch.manual_seed(0)
    # Without weights, fasterrcnn_resnet50_fpn has batch norms that are not frozen; the published one's are.
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d)
    network = FasterRCNN(backbone, _LABELS)
    with torch.no_grad():
        for name, norm in network.backbone.body.named_modules():
            if name.endswith("bn3"):  # as in subjects.py, for the same reason
                norm.weight.mul_(0.1)
    return network.eval().to(device)


def torchvision_images(batch: list[dict], device: torch.device) -> list[torch.Tensor]:
    """The images of a batch as torchvision takes them; Detectron2's models do as much themselves."""
    return [item["image"].to(device).float() / 255 for item in batch]


def keep_size(network: nn.Module, size: Size) -> None:
    """Let torchvision's detector work on images of ``size`` as they are."""
    network.transform.min_size, network.transform.max_size = (min(size),), max(size)
