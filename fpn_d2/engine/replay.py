"""A training step once more, from a file: which layer's values are the first that are not finite.

Such a file holds what a step was made of: the images and boxes as the model saw them, the weights (or the name of the
file beside it that has them), the seed of its random choices, and the configuration.
"""

import contextlib
import os
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks, RotatedBoxes
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from fpn_d2.checkpoint.contents import KEY
from fpn_d2.checkpoint.reading import read_checkpoint, read_weights
from fpn_d2.config import get_cfg
from fpn_d2.config_files import parse_config
from fpn_d2.errors import UserError
from fpn_d2.modeling import without_timm_weights

from .precision import autocast
from .randomness import random_states_put_back, seed_all

_STRUCTURES = {cls.__name__: cls for cls in (Boxes, RotatedBoxes, BitMasks, Keypoints)}


def plain_batch(batch: list[dict]) -> list[dict]:
    """Detectron2's inputs of a model as tensors, text, numbers and plain containers."""
    return [{key: _plain(value) for key, value in image.items()} for image in batch]


def batch_of(plain: list[dict]) -> list[dict]:
    """What `plain_batch` was given."""
    return [{key: _built(value) for key, value in image.items()} for image in plain]


def _plain(value: object) -> object:
    if isinstance(value, Instances):
        fields = {name: _plain(field) for name, field in value.get_fields().items()}
        return {"kind": "Instances", "size": list(value.image_size), "fields": fields}
    if type(value).__name__ in _STRUCTURES:
        return {"kind": type(value).__name__, "tensor": value.tensor.detach().cpu()}
    if isinstance(value, PolygonMasks):
        return {"kind": "PolygonMasks", "polygons": [[torch.as_tensor(p) for p in one] for one in value.polygons]}
    if isinstance(value, Tensor):
        return value.detach().cpu()
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def _built(value: object) -> object:
    if not isinstance(value, dict):
        return value
    if value["kind"] == "Instances":
        size = tuple(value["size"])
        return Instances(size, **{name: _built(field) for name, field in value["fields"].items()})
    if value["kind"] == "PolygonMasks":
        return PolygonMasks([[p.numpy() for p in one] for one in value["polygons"]])
    return _STRUCTURES[value["kind"]](value["tensor"])


def all_finite(value: object) -> bool:
    """Whether all numbers in tensors, containers and structures of Detectron2's are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, Instances):
        return all(map(all_finite, value.get_fields().values()))
    if isinstance(value, dict):
        return all(map(all_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(all_finite, value))
    return all_finite(value.tensor) if hasattr(value, "tensor") else True


def losses_and_first(model: nn.Module, batch: list[dict], seed: int, context: Callable) -> tuple[dict, str]:
    """Run ``model`` on a batch as in training.

    Args:
        model: Its buffers may change, as in a step.
        batch: Its input.
        seed: Of its random choices.
        context: Makes the context of the forward pass.

    Returns:
        The losses (none if the pass did not come so far), and the first layer with an output that is not finite, as
        "backbone.bottom_up.stem.conv1 (Conv2d)", or the weight that is not finite itself; "" if all are finite.
    """
    first = [f"the weight {name} itself" for name, value in model.state_dict().items() if not all_finite(value)][:1]

    def look(name: str) -> Callable:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not first and not all_finite(output):
                first.append(f"{name} ({type(module).__name__})")

        return hook

    losses: dict[str, Tensor] = {}  # stays so where Detectron2 stops at boxes that are not finite
    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with random_states_put_back(), EventStorage(1), context(), contextlib.suppress(FloatingPointError):
            seed_all(seed)
            losses = model(batch)
    finally:
        for handle in handles:
            handle.remove()
    bad = [name for name, loss in losses.items() if not all_finite(loss)]
    if bad and not first:
        first.append(f"the loss {bad[0]} itself")
    return losses, first[0] if first else ""


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """L2 norm of the gradient of each tensor that has one."""
    return {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}


def first_bad_gradient(norms: dict[str, float]) -> str:
    """Of the gradients that are not finite the one that the backward pass meets first; "" if all are."""
    bad = [name for name, norm in norms.items() if not all_finite(torch.tensor(norm))]
    return f"the gradient of {bad[-1]}" if bad else ""


def replay(file: str, weights: str = "") -> str:
    """Make the step in ``file`` once more on the CPU and say what it comes to.

    Args:
        file: Of the folder ``bad_steps`` of a training.
        weights: A checkpoint to take the weights from instead.

    Returns:
        Some lines: iteration, images, losses then and now, the first layer that is not finite, the largest gradients.

    Raises:
        UserError: The file is another one.
    """
    from detectron2.modeling import build_model

    record = read_weights(file)
    step = record.get("step") if isinstance(record, dict) else None
    if not isinstance(step, dict) or KEY not in record:
        raise UserError(f"{file} holds no training step: those lie in the folder bad_steps of a training's output")
    weights = weights or os.path.join(os.path.dirname(file), step["weights"])
    cfg = get_cfg()
    cfg.merge_from_other_cfg(CfgNode(parse_config(record[KEY]["config"], file)))
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(without_timm_weights(cfg)).train()
    model.load_state_dict(read_checkpoint(weights)["model"])
    for module, numbers in step["numbers"].items():
        vars(model.get_submodule(module)).update(numbers)
    losses, first = losses_and_first(model, batch_of(step["batch"]), step["seed"], lambda: autocast(cfg))
    if losses:
        sum(losses.values()).backward()
    norms = gradient_norms(model)
    lines = [
        f"iteration {step['iteration']}, learning rate {step['learning_rate']:g}, images {', '.join(step['files'])}",
        f"losses then: {_numbers(step['losses'])}",
        f"losses now:  {_numbers({name: float(loss) for name, loss in losses.items()})}",
        f"first value that is not finite: {first or first_bad_gradient(norms) or 'none'}",
    ]
    largest = sorted(norms, key=lambda name: -norms[name] if norms[name] == norms[name] else float("-inf"))[:5]
    lines.append("largest gradients: " + ", ".join(f"{name} {norms[name]:.3g}" for name in largest))
    return "\n".join(lines)


def _numbers(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items()) or "none"
