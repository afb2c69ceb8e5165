"""Gradient checkpointing of Detectron2's bottom-up pathways (Chen et al., "Training deep nets with sublinear memory
cost", 2016): maps inside a stage are recomputed in the backward pass, only those between stages are kept."""

import torch
from detectron2.layers import CNNBlockBase
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fpn_d2.errors import UserError

KEY = "MODEL.BACKBONE.GRADIENT_CHECKPOINTING"


class CheckpointedStage(nn.Sequential):
    """A stage whose blocks run one after the other, and once more in the backward pass.

    A whole stage at a time: the peak is where the neck and the RPN go backward, when all that was kept is still there.
    What one stage recomputes comes later, and fits into what they have left.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        trains = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        if not trains or torch.jit.is_tracing():
            return super().forward(x)
        return checkpoint(super().forward, x, use_reentrant=False)


def checkpoint_stages(bottom_up: nn.Module) -> None:
    """Let the stages of one of Detectron2's convolutional networks recompute their maps, in place.

    Parameters and their names stay. A batch norm that trains updates its running statistics twice per step.

    Args:
        bottom_up: a ResNet, RegNet, or another whose stages run blocks (``CNNBlockBase``) one after the other.

    Raises:
        UserError: it has no such stages.
    """
    stages = {}
    for name, child in list(bottom_up.named_children()):
        if not isinstance(child, CNNBlockBase) and all(isinstance(b, CNNBlockBase) for b in child.children()):
            if len(list(child.children())) == 0:
                continue
            stage = CheckpointedStage.__new__(CheckpointedStage)
            stage.__dict__ = child.__dict__
            setattr(bottom_up, name, stage)
            stages[child] = stage
    if not stages:
        raise UserError(
            f"{KEY} is True, but {type(bottom_up).__name__} has no stages of Detectron2's blocks to recompute; set it "
            "to False"
        )
    # Detectron2's networks hold their stages a second time, in lists.
    for name, value in vars(bottom_up).items():
        if name == "stages":
            bottom_up.stages = [stages.get(stage, stage) for stage in value]
        elif name == "stages_and_names":
            bottom_up.stages_and_names = [(stages.get(stage, stage), other) for stage, other in value]
