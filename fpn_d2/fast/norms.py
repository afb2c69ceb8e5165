"""timm's frozen batch normalisation as one operation, where timm multiplies and adds whole maps."""

import torch.nn.functional as F
from torch import Tensor

from .guard import Fast, are_plain, is_itself


class FastFrozenNormAct(Fast):
    """timm's ``FrozenBatchNormAct2d``: fixed statistics and affine parameters, then an activation.

    Under autocast the result has the precision of the maps, as with PyTorch's and Detectron2's norms; timm's own turns
    them into float32, which the next convolution turns back.
    """

    REPLACES = ("forward",)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        own = (self.weight, self.bias, self.running_mean, self.running_var)
        if not (is_itself(self) and x.dim() == 4 and are_plain(x, *own)):
            return super().forward(x)
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return self.act(self.drop(x))
