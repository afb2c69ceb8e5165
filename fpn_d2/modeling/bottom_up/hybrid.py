"""Hybrid of a ResNet and a vision transformer: convolutions up to C4, attention for C5.

Shape legend, for an image of H x W pixels in a batch of N:
    res2..res4   maps of the ResNet
    res5         (N, channels, ceil(H / 32), ceil(W / 32)): 3x3 stride-2 convolution of res4, position embedding,
                 transformer blocks over all its cells, layer norm
"""

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import ResNet, build_resnet_backbone
from torch import Tensor, nn

from fpn_d2.errors import UserError

from .names import register_bottom_up
from .timm_weights import require_timm


class TransformerStage(nn.Module):
    """A stride-2 convolution, then transformer blocks in which every cell attends to every other.

    Args:
        in_channels: of the map that it is applied to.
        channels: width of the blocks and of the result; a multiple of 4 and of ``num_heads``.
        depth: number of blocks.
        num_heads: of the attention.
        mlp_ratio: width of the hidden layer of each block's MLP, as a multiple of ``channels``.
        drop_path: rate of stochastic depth in the last block, growing linearly up to it.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if channels % 4 or channels % num_heads:
            raise UserError(
                f"channels (MODEL.HYBRID.CHANNELS) is {channels}; expected a multiple of 4 and of num_heads "
                f"(MODEL.HYBRID.NUM_HEADS), which is {num_heads}"
            )
        if depth < 1:
            raise UserError(f"depth (MODEL.HYBRID.DEPTH) is {depth}; expected at least one block")
        require_timm()
        from timm.models.vision_transformer import Block

        self.conv = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(
            *(
                Block(
                    channels,
                    num_heads,
                    mlp_ratio,
                    qkv_bias=True,
                    drop_path=drop_path * (i / (depth - 1) if depth > 1 else 1),
                )
                for i in range(depth)
            )
        )
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, channels, ceil(h / 2), ceil(w / 2))."""
        x = self.conv(x)
        n, channels, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2) + sine_position_embedding(height, width, channels, x.device).to(x)
        return self.norm(self.blocks(tokens)).transpose(1, 2).reshape(n, channels, height, width)


def sine_position_embedding(height: int, width: int, channels: int, device: torch.device | str = "cpu") -> Tensor:
    """Position embedding of a grid of any size (Vaswani et al., NeurIPS 2017, section 3.5, for rows and columns each).

    Cell (i, j) has the same embedding on every grid: an image's cells do not change with the padding of its batch.

    Returns:
        (1, height * width, channels), cells in row-major order; a quarter of the channels each for sine and cosine of
        the row, sine and cosine of the column.
    """
    frequencies = 10000.0 ** -(torch.arange(channels // 4, device=device) / (channels // 4))
    rows, columns = (torch.arange(side, device=device)[:, None] * frequencies for side in (height, width))
    rows, columns = torch.cat([rows.sin(), rows.cos()], 1), torch.cat([columns.sin(), columns.cos()], 1)
    grid = [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)]
    return torch.cat(grid, dim=2).reshape(1, height * width, channels)


class HybridResNetViT(ResNet):
    """Detectron2's ResNet up to C4, with its parameter names, and C5 from transformer blocks (``res5``)."""

    def __init__(self, resnet: ResNet, res5: TransformerStage, out_features: list[str], freeze_at: int = 0):
        """Join the two.

        Args:
            resnet: a ResNet with the stages res2 to res4; its parts become this module's.
            res5: the stage on top.
            out_features: names of the maps to give, res5 among them.
            freeze_at: 5 or more freezes ``res5``; the ResNet has been frozen when it was made.

        Raises:
            UserError: ``out_features`` has no res5.
        """
        if "res5" not in out_features:
            raise UserError(
                f"out_features (MODEL.RESNETS.OUT_FEATURES) is {list(out_features)}, without the res5 that the "
                "transformer blocks make; add it, or use build_resnet_backbone"
            )
        of_resnet = [name for name in out_features if name != "res5"]
        stages = [list(stage.children()) for stage in resnet.stages]
        super().__init__(resnet.stem, stages, out_features=sorted({*of_resnet, "res4"}))
        self.res5 = res5
        if freeze_at >= 5:
            self.res5.requires_grad_(False)
        self._wanted = [*of_resnet, "res5"]
        self._out_feature_channels["res5"] = res5.conv.out_channels
        self._out_feature_strides["res5"] = 2 * self._out_feature_strides["res4"]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the maps of the images ``x`` (N, 3, H, W), from high to low resolution."""
        maps = super().forward(x)
        maps["res5"] = self.res5(maps["res4"])
        return {name: maps[name] for name in self._wanted}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each map."""
        channels, strides = self._out_feature_channels, self._out_feature_strides
        return {name: ShapeSpec(channels=channels[name], stride=strides[name]) for name in self._wanted}


@register_bottom_up
def build_hybrid_resnet_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> HybridResNetViT:
    """Build the ResNet of ``cfg.MODEL.RESNETS`` with the C5 of ``cfg.MODEL.HYBRID``.

    Raises:
        UserError: MODEL.RESNETS.OUT_FEATURES lacks res5, or the blocks cannot have the sizes asked for.
    """
    upto_c4 = cfg.clone()
    upto_c4.defrost()
    upto_c4.MODEL.RESNETS.OUT_FEATURES = ["res4"]
    resnet = build_resnet_backbone(upto_c4, input_shape)
    keys = cfg.MODEL.HYBRID
    in_channels = resnet.output_shape()["res4"].channels
    res5 = TransformerStage(
        in_channels, keys.CHANNELS, keys.DEPTH, keys.NUM_HEADS, mlp_ratio=keys.MLP_RATIO, drop_path=keys.DROP_PATH
    )
    return HybridResNetViT(resnet, res5, cfg.MODEL.RESNETS.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
