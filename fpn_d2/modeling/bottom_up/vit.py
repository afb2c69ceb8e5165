"""Plain vision transformer (Dosovitskiy et al., ICLR 2021) through timm, as a bottom-up pathway.

Shape legend, for an image of H x W pixels in a batch of N and patches of P x P pixels (16 as a rule):
    tokens   (N, ceil(H / P) * ceil(W / P), C) in row-major order; class token and registers are left out
    res{k}   (N, C_k, ceil(H / 2^k), ceil(W / 2^k))
"""

import math
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from fpn_d2.errors import UserError

from ..necks.parts import ChannelLayerNorm, rescale_layers
from ..sizes import cut_to_stride, pad_to_multiple
from .names import register_bottom_up
from .timm_backbone import turn_on_checkpointing
from .timm_weights import check_name, create_model, timm_arguments, weight_source

DEPTH_LEVELS = (2, 3, 4, 5)


class ViTBackbone(Backbone):
    """A plain ViT that gives either its last map or four maps from different depths.

    Images may have any size: they are padded with zeros to whole patches, and position embeddings are interpolated to
    the grid of patches. Every block attends to the whole image. The parameters of the ViT are under ``vit``.
    """

    def __init__(
        self,
        name: str,
        *,
        out_blocks: Sequence[int] = (),
        in_channels: int = 3,
        pretrained: bool = False,
        weights: str = "",
        freeze_at: int = 0,
        drop_path: float = 0.0,
        gradient_checkpointing: bool = False,
        options: dict | None = None,
    ):
        """Make the model.

        Args:
            name: of the timm model, e.g. vit_base_patch16_224.
            out_blocks: empty: one map, the tokens after the last block and the final norm, for a simple feature
                pyramid; named res4 for patches of 16. Four ascending numbers of blocks, counted from 1, as 3, 6, 9,
                12: the tokens after each, brought to strides 4, 8, 16 and 32 as res2 to res5, for an FPN. Later
                blocks and the final norm are left out.
            in_channels: channels of the images.
            pretrained: let timm download its weights.
            weights: file of weights for this timm model; empty: none.
            freeze_at: 1 freezes patch and position embeddings, 1 + n also the first n blocks; 0 nothing.
            drop_path: rate of stochastic depth in the last block, growing linearly up to it.
            gradient_checkpointing: recompute each block in the backward pass to save memory.
            options: more arguments of ``timm.create_model`` for this model.

        Raises:
            UserError: the model is no plain ViT, its patches are no power of 2, or an option has no such
                value; ``weights`` does not exist, or timm is not installed.
        """
        super().__init__()
        check_name(name)
        options = {"dynamic_img_size": True, "drop_path_rate": drop_path} | (options or {}) | {"in_chans": in_channels}
        source = weight_source(name, options, pretrained, weights)
        try:
            self.vit = create_model(name, options, **source)
        except ValueError as error:
            raise UserError(
                f"MODEL.TIMM.NAME has to name a plain ViT that takes images of any size: {error}"
            ) from error
        needed = ("blocks", "patch_embed", "forward_intermediates", "prune_intermediate_layers")
        if not all(hasattr(self.vit, part) for part in needed):
            raise UserError(
                f"timm's {name} is no plain ViT; name one, as vit_base_patch16_224, or use build_timm_backbone"
            )
        patch, depth, channels = self.vit.patch_embed.patch_size, len(self.vit.blocks), self.vit.embed_dim
        if patch[0] != patch[1] or math.log2(patch[0]) % 1:
            raise UserError(
                f"timm's {name} has patches of {patch[0]} x {patch[1]}; expected a square with a power of 2, which "
                'MODEL.TIMM.OPTIONS [["patch_size", 16]] makes of it'
            )
        self.patch_size, patch_level = patch[0], int(math.log2(patch[0]))
        blocks = list(out_blocks)
        ascending = blocks == sorted(set(blocks)) and set(blocks) <= set(range(1, depth + 1))
        if blocks and (len(blocks) != len(DEPTH_LEVELS) or not ascending):
            raise UserError(
                f"out_blocks (MODEL.VIT.OUT_BLOCKS) is {blocks}; expected nothing, or four ascending numbers of blocks "
                f"from 1 to {depth}, which is how many {name} has"
            )
        self.single = not blocks
        self._indices = [block - 1 for block in blocks or [depth]]
        self.vit.prune_intermediate_layers(self._indices, prune_norm=not self.single)
        self.rescale = nn.ModuleDict()
        self._shapes = {}
        for level in [patch_level] if self.single else DEPTH_LEVELS:
            layers, width = rescale_layers(channels, patch_level - level, ChannelLayerNorm)
            self.rescale[f"res{level}"] = nn.Sequential(*layers)
            self._shapes[f"res{level}"] = ShapeSpec(channels=width, stride=2**level)
        self._freeze(freeze_at)
        if gradient_checkpointing:
            turn_on_checkpointing(self.vit, name)

    def _freeze(self, freeze_at: int) -> None:
        if freeze_at < 0:
            raise UserError(f"freeze_at (MODEL.BACKBONE.FREEZE_AT) is {freeze_at}; expected 0 or more")
        if freeze_at == 0:
            return
        blocks = {f"blocks.{i}." for i in range(freeze_at - 1)}
        for name, parameter in self.vit.named_parameters():
            embeds = not name.startswith(("blocks.", "norm."))
            if embeds or any(name.startswith(block) for block in blocks):
                parameter.requires_grad = False

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the maps of the images ``x`` (N, 3, H, W), from high to low resolution."""
        maps = self.vit.forward_intermediates(
            pad_to_multiple(x, self.patch_size), indices=self._indices, norm=self.single, intermediates_only=True
        )
        size = tuple(x.shape[-2:])
        return {
            name: cut_to_stride(self.rescale[name](value), size, shape.stride)
            for (name, shape), value in zip(self._shapes.items(), maps, strict=True)
        }

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each map."""
        return dict(self._shapes)

    @property
    def size_divisibility(self) -> int:
        """The side of a patch; other images are padded inside."""
        return self.patch_size


@register_bottom_up
def build_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ViTBackbone:
    """Build the plain ViT ``cfg.MODEL.TIMM.NAME``, with the maps that ``cfg.MODEL.VIT.OUT_BLOCKS`` asks for.

    Raises:
        UserError: it cannot be had as the configuration asks, or its weights expect other images.
    """
    return ViTBackbone(out_blocks=cfg.MODEL.VIT.OUT_BLOCKS, in_channels=input_shape.channels, **timm_arguments(cfg))
