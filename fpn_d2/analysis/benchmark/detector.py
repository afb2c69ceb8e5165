"""Benchmarks of the whole detector beside Detectron2's own with the same weights: inference, training, its memory."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from fpn_d2.config_names import config_file
from fpn_d2.engine.precision import autocast
from fpn_d2.fast.roi_align.roi_align import choose
from fpn_d2.huge_pages import HUGE_PAGES

from .. import parity
from ..compare.measure import MEMORY_WORKER, inference_call, training_call
from ..measure.complexity import count_macs
from ..measure.memory import peak_in_child
from ..subjects import Model, build_pair, optimized, random_batch, read_config
from .line import Check, Ours, Timing, Work, line, time_lines

CONFIG = config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
# What makes Detectron2's own detector of a config of ours.
STOCK = [
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.PROPOSAL_GENERATOR.NAME", "RPN"),
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.NUMERICS", "exact"),
]
BFLOAT16 = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16"]
CHECKPOINTING = "MODEL.BACKBONE.GRADIENT_CHECKPOINTING"
# What bfloat16, with 8 bits of a number, may make of maps behind many convolutions; under PyTorch's own autocast it is
# up to 0.025 in small maps.
BFLOAT16_ALLOWED = 0.05
# Of losses and gradients, which go through more than maps do.
_LOSSES = {"float32": 1e-5, "bfloat16": 0.01}
_GRADIENTS = {"float32": 3e-4, "bfloat16": 0.1}
_ALL = 100_000  # more than there are anchors or proposals of an image
Size = tuple[int, int]


def build_twins(config: str = CONFIG, opts: Sequence[str] = (), own_opts: Sequence[str] = ()) -> tuple[Model, Model]:
    """Detectron2's detector and ours, with the same random weights, on the CPU.

    Args:
        config: a config of ours.
        opts: KEY value pairs on top of both.
        own_opts: and on top of ours.
    """
    configs = [(config, *read_config(config, [*opts, *more], "cpu")) for more in (STOCK, own_opts)]
    return build_pair((configs[0], configs[1]), "")


def inference(
    timing: Timing,
    *,
    size: Size,
    dtype: str = "float32",
    config: str = CONFIG,
    opts: Sequence[str] = (),
) -> list[dict]:
    """One image from pixels to detections; Detectron2's detector is in float32 throughout.

    Args:
        timing: how often.
        size: (height, width) of the image in pixels.
        dtype: "float32": our detector as the config builds it and optimised for inference; "bfloat16": only the latter.
        config: of the detectors.
        opts: KEY value pairs on top of it.
    """
    stock, own = build_twins(config, opts)
    batch = random_batch(own.cfg, 1, size)
    networks = {"as built": own.network} if dtype == "float32" else {}
    networks[f"optimised, {dtype}"] = optimized(own.network, dtype)
    expected = parity.capture(stock.network, batch)
    ours: dict[str, Ours | str] = {}
    for name, network in networks.items():
        came = parity.capture(network, batch)
        counts = [f"{len(came[stage]['image 0'])} {stage}" for stage in ("proposals", "detections")]
        note = ", ".join([*counts, f"pooling {choose('auto', [torch.zeros(1, 1, 1, 1)])}"])
        ours[name] = Ours(inference_call(network, batch), inference_checks(expected, came, dtype), note)
    call = inference_call(stock.network, batch)
    return time_lines(call, ours, timing, work=Work(count_macs(call), getattr(torch, dtype)))


def inference_checks(expected: parity.Stages, came: parity.Stages, dtype: str) -> list[Check]:
    """How far pyramid, proposals and detections are from Detectron2's; in lower precision the pyramid alone counts.

    There, which of many almost equal scores of random weights are the highest is another draw.
    """
    tolerance = parity.Tolerance() if dtype == "float32" else parity.Tolerance(relative=BFLOAT16_ALLOWED)
    return checks_of(parity.compare(expected, came, tolerance), dtype, tolerance)


def checks_of(
    differences: Sequence[parity.Difference], dtype: str, tolerance: parity.Tolerance | None = None
) -> list[Check]:
    """The same of differences that are there, made with ``tolerance``."""
    tolerance = tolerance or parity.Tolerance()
    kinds = [("pyramid", "pyramid", "", tolerance.relative, "of the largest value")]
    if dtype == "float32":
        kinds += [
            ("proposals", "proposals", "boxes", tolerance.pixels, "px"),
            ("detections", "detections", "boxes", tolerance.pixels, "px"),
            ("scores", "detections", "scores", tolerance.score, ""),
        ]
    checks = []
    for what, stage, ending, allowed, unit in kinds:
        found = [one for one in differences if one.stage == stage and one.item.endswith(ending)]
        values = [one.max_abs if ending else one.max_rel for one in found]
        there = [value for value in values if value is not None]
        worst = float("nan") if any(value != value for value in there) else max(there, default=None)
        checks.append(Check(what, worst, allowed, unit, bool(found) and all(one.within for one in found)))
    return checks


def training(
    timing: Timing,
    *,
    dtype: str,
    size: Size = (480, 640),
    batch: int = 2,
    config: str = CONFIG,
    opts: Sequence[str] = (),
) -> list[dict]:
    """A whole step of the trainer: forward, backward, optimizer; Detectron2's is in float32 throughout.

    Args:
        timing: how often.
        dtype: "float32" or "bfloat16", of our forward pass (SOLVER.AMP).
        size: (height, width) of the images in pixels.
        batch: number of images.
        config: of the detectors.
        opts: KEY value pairs on top of it.
    """
    stock, own = build_twins(config, opts, BFLOAT16 if dtype == "bfloat16" else ())
    images = random_batch(own.cfg, batch, size)
    checks = _training_checks(*(_step(model.cfg, model.network, images) for model in (stock, own)), dtype)
    calls = [training_call(model.cfg, model.network, images) for model in (stock, own)]
    work = Work(count_macs(calls[0]), getattr(torch, dtype))
    return time_lines(calls[0], {dtype: Ours(calls[1], checks)}, timing, work=work)


def _step(cfg: CfgNode, network: nn.Module, images: list[dict]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The losses and the gradients of one step.

    They are those of all anchors and proposals here, not of a sample of them: where rounding swaps two neighbours in
    the order of the proposals, the same seed draws another sample.
    """
    network.train()
    samplers = [network.proposal_generator, network.roi_heads]
    numbers = [sampler.batch_size_per_image for sampler in samplers]
    try:
        for sampler in samplers:
            sampler.batch_size_per_image = _ALL
        with EventStorage(), autocast(cfg):
            losses = network(images)
        sum(losses.values()).backward()
    finally:
        for sampler, number in zip(samplers, numbers, strict=True):
            sampler.batch_size_per_image = number
    gradients = {name: one.grad for name, one in network.named_parameters() if one.grad is not None}
    network.zero_grad(set_to_none=True)
    return {name: loss.item() for name, loss in losses.items()}, gradients


def _training_checks(theirs: tuple, ours: tuple, dtype: str) -> list[Check]:
    (losses, gradients), (own_losses, own_gradients) = theirs, ours
    if losses.keys() != own_losses.keys() or gradients.keys() != own_gradients.keys():
        raise ValueError("the two detectors have other losses or train other parameters")
    # In lower precision other proposals overlap the few objects by half, and the loss of their boxes is another one.
    exact, total = dtype == "float32", sum(losses.values())
    differences = [abs(own_losses[name] - loss) / max(loss if exact else total, 1e-12) for name, loss in losses.items()]
    loss = float("nan") if any(value != value for value in differences) else max(differences)
    squares = [(own_gradients[name].double() - one.double()).square().sum() for name, one in gradients.items()]
    length = sum(one.double().square().sum() for one in gradients.values()).sqrt()
    gradient = float(sum(squares).sqrt() / length)
    return [
        Check("losses", loss, _LOSSES[dtype], "of each" if exact else "of their sum", loss <= _LOSSES[dtype]),
        Check("gradients", gradient, _GRADIENTS[dtype], "of their length", gradient <= _GRADIENTS[dtype]),
    ]


def training_memory(
    timing: Timing,
    *,
    size: Size = (480, 640),
    batch: int = 2,
    config: str = CONFIG,
    opts: Sequence[str] = (),
) -> list[dict]:
    """Peak of memory that training steps add to a process: a fresh one for each figure, Detectron2's in float32 first.

    Each runs as its own commands run it: ours with large tensors in huge pages, Detectron2's without, and a line says
    what these alone make of Detectron2's.

    Args:
        timing: how often.
        size: (height, width) of the images in pixels.
        batch: number of images.
        config: of the detectors.
        opts: KEY value pairs on top of it.
    """
    cfg = read_config(config, opts, "cpu")[1]
    missing = "" if _has(cfg, CHECKPOINTING) else f"this version has no gradient checkpointing ({CHECKPOINTING})"
    checkpointing = [CHECKPOINTING, "True"]
    ways: dict[str, list[str] | str] = {
        "Detectron2's, in huge pages": STOCK,
        "float32": [],
        "bfloat16": BFLOAT16,
        "float32, gradient checkpointing": missing or checkpointing,
        "bfloat16, gradient checkpointing": missing or [*BFLOAT16, *checkpointing],
    }
    measured = {name: more for name, more in ways.items() if not isinstance(more, str)}
    peaks: dict[str, list[float]] = {name: [] for name in ("", *measured)}
    reasons = {name: more for name, more in ways.items() if isinstance(more, str)}
    total, done = timing.rounds * len(peaks), 0
    for _ in range(timing.rounds):
        for name in peaks:
            own_opts = STOCK if name == "" else measured[name]
            peak = _peak(config, [*opts, *own_opts], size, batch, huge_pages=name != "")
            if isinstance(peak, str):
                reasons.setdefault(name, peak)
            else:
                peaks[name].append(peak)
            done += 1
            timing.progress(done, total)
    if "" in reasons:
        raise ValueError(f"Detectron2's detector: {reasons['']}")
    return [
        {"ours": name, "not_measured": reasons[name]}
        if name in reasons
        else line(name, peaks[""], peaks[name], "MB", note="results: see its training step" if name in _LOSSES else "")
        for name in ways
    ]


def _peak(config: str, opts: Sequence[str], size: Size, batch: int, huge_pages: bool) -> float | str:
    return peak_in_child(
        MEMORY_WORKER,
        {
            "config": config,
            "opts": [*opts, "MODEL.DEVICE", "cpu"],
            "weights": "",
            "mode": "training",
            "size": size,
            "batch": batch,
            "threads": torch.get_num_threads(),
            "optimize": "",
            "variables": {HUGE_PAGES: str(int(huge_pages))},
        },
    )


def _has(cfg: CfgNode, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(cfg, CfgNode) or part not in cfg:
            return False
        cfg = cfg[part]
    return True
