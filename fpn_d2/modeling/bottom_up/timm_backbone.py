"""Any timm model that has feature maps, as a bottom-up pathway.

Shape legend, for an image of H x W pixels in a batch of N:
    res{k}   map of level k, stride 2^k: (N, C_k, ceil(H / 2^k), ceil(W / 2^k)), the deepest with that stride
"""

import importlib
import math
import re
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from fpn_d2.errors import UserError

from ..sizes import cut_to_stride, pad_to_multiple
from .names import register_bottom_up
from .timm_weights import check_name, create_model, timm_arguments, weight_source

NORMS = ("", "FrozenBN", "SyncBN")
# First layers of models whose first map is that of the first stage, as timm calls them.
STEM = re.compile(r"(model\.)?(stem|patch_embed)[._]")


class TimmBackbone(Backbone):
    """A timm model made with ``features_only=True``; its parameters are under ``body``, with timm's names.

    Strides and layout (N, C, H, W or N, H, W, C) are measured on a small image when it is made. A model that rounds
    sizes down, or takes only multiples of its coarsest stride, gets its images padded inside.

    Example:
        >>> backbone = TimmBackbone("resnet18", out_features=["res4", "res5"])
        >>> {name: tuple(x.shape) for name, x in backbone(torch.zeros(1, 3, 75, 101)).items()}
        {'res4': (1, 256, 5, 7), 'res5': (1, 512, 3, 4)}
    """

    def __init__(
        self,
        name: str,
        *,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        in_channels: int = 3,
        pretrained: bool = False,
        weights: str = "",
        freeze_at: int = 0,
        norm: str = "",
        drop_path: float = 0.0,
        gradient_checkpointing: bool = False,
        options: dict | None = None,
    ):
        """Make the model.

        Args:
            name: of the timm model, with or without the tag of its weights.
            out_features: maps to give, ``res{k}`` for stride 2^k.
            in_channels: channels of the images.
            pretrained: let timm download its weights.
            weights: file of weights for this timm model; empty: none.
            freeze_at: stages to freeze, batch norms included, as Detectron2 counts them: 1 the stem, 2 also all that
                leads to res2, 3 to res3, ...; 0 none.
            norm: "" for the model's own norms; "FrozenBN" or "SyncBN" turn its batch norms into these.
            drop_path: rate of stochastic depth.
            gradient_checkpointing: recompute maps in the backward pass to save memory. Batch norms that train see
                each batch twice.
            options: more arguments of ``timm.create_model`` for this model.

        Raises:
            UserError: timm has no such model, it lacks the maps or takes no small images, or an option has no such
                value; ``weights`` does not exist, or timm is not installed.
        """
        super().__init__()
        check_name(name)
        if norm not in NORMS:
            raise UserError(f"norm (MODEL.TIMM.NORM) is {norm!r}; expected an empty string, FrozenBN or SyncBN")
        options = (options or {}) | {"in_chans": in_channels} | ({"drop_path_rate": drop_path} if drop_path else {})
        probe = _Probe(name, options)
        missing = [feature for feature in out_features if feature not in probe.indices]
        if missing or not out_features:
            raise UserError(
                f"out_features (MODEL.TIMM.OUT_FEATURES) asks for {', '.join(missing) or 'nothing'}; timm's {name} "
                f"gives {probe.available()}"
                + ("; a plain ViT is for build_vit_backbone" if len(probe.indices) == 1 else "")
            )
        names = sorted(out_features, key=lambda feature: probe.shapes[feature].stride)
        self._shapes = {feature: probe.shapes[feature] for feature in names}
        self._channels_last = {feature: probe.channels_last[probe.indices[feature]] for feature in names}
        self._padding = probe.padding
        taken = [probe.indices[feature] for feature in names]
        source = weight_source(name, options | probe.extra, pretrained, weights)
        self.body = create_model(
            name, options | probe.extra, features_only=True, out_indices=[probe.out_indices[i] for i in taken], **source
        )
        frozen = probe.frozen_parameters(freeze_at)
        self.body = _convert_norms(self.body, norm, name)
        _freeze(self.body, frozen)
        if gradient_checkpointing:
            turn_on_checkpointing(getattr(self.body, "model", self.body), name)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the maps of the images ``x`` (N, 3, H, W), from high to low resolution."""
        maps = self.body(pad_to_multiple(x, self._padding))
        out = {}
        for (name, shape), value in zip(self._shapes.items(), maps, strict=True):
            value = value.permute(0, 3, 1, 2) if self._channels_last[name] else value
            out[name] = cut_to_stride(value, tuple(x.shape[-2:]), shape.stride)
        return out

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each map."""
        return dict(self._shapes)

    @property
    def size_divisibility(self) -> int:
        """What the model's sides have to be multiples of; other images are padded inside."""
        return self._padding if self._padding > 1 else 0


class _Probe:
    """What a timm model gives, found out on small images with a copy that is then thrown away.

    Attributes:
        extra: arguments that make the model take images of any size.
        padding: what the sides of images have to be multiples of; 1: nothing.
        indices: position of each map ``res{k}`` in the model's list.
        shapes: its channels and stride.
        channels_last: for each position, whether the layout is (N, H, W, C).
        out_indices: for each position, timm's own index.
    """

    def __init__(self, name: str, options: dict):
        self.in_channels = options["in_chans"]
        reason = None
        # The last two are for models that otherwise insist on the size of image that they were trained with.
        for extra in ({}, {"strict_img_size": False}, {"dynamic_img_size": True}):
            try:
                with torch.random.fork_rng(devices=[]):
                    self.body = create_model(name, options, features_only=True, **extra).eval()
            except ValueError:
                if extra:
                    continue
                raise
            self.extra = extra
            info = self.body.feature_info
            self.channels, self.strides = info.channels(), [int(stride) for stride in info.reduction()]
            self.out_indices = list(info.out_indices)
            for padding in (1, max(self.strides)):
                self.padding = padding
                try:
                    self.channels_last = self._layouts()
                except Exception as error:  # whatever the model raises for a size that it does not like
                    reason = reason or error
                else:
                    self._name_maps()
                    return
        raise UserError(
            f"timm's {name} cannot be used at any size of image ({reason}); it declares strides {self.strides} with "
            f"channels {self.channels}"
        ) from reason

    def _images(self) -> Tensor:
        """One image with sides one above and one below a multiple of every stride, padded if need be."""
        stride = max(self.strides)
        return pad_to_multiple(torch.zeros(1, self.in_channels, 2 * stride + 1, 4 * stride - 1), self.padding)

    def _layouts(self) -> list[bool]:
        images = self._images()
        with torch.no_grad():
            maps = self.body(images)
        layouts = []
        for value, channels, stride in zip(maps, self.channels, self.strides, strict=True):
            height, width = (math.ceil(side / stride) for side in images.shape[-2:])
            shapes = [(1, channels, height, width), (1, height, width, channels)]
            if tuple(value.shape) not in shapes:
                raise ValueError(f"a map of {tuple(value.shape)} where {shapes[0]} or {shapes[1]} was declared")
            layouts.append(tuple(value.shape) != shapes[0])
        return layouts

    def _name_maps(self) -> None:
        levels = [math.log2(stride) for stride in self.strides]
        # A later map of the same stride replaces an earlier one.
        self.indices = {f"res{int(level)}": i for i, level in enumerate(levels) if level % 1 == 0}
        self.shapes = {
            name: ShapeSpec(channels=self.channels[i], stride=self.strides[i]) for name, i in self.indices.items()
        }

    def available(self) -> str:
        """The maps in words."""
        return ", ".join(f"{name} (stride {s.stride}, {s.channels} channels)" for name, s in self.shapes.items())

    def frozen_parameters(self, freeze_at: int) -> set[str]:
        """Return the names of the parameters that the first ``freeze_at`` stages consist of.

        A stage is what leads to a map and not to any finer one: found by asking autograd, not by name.

        Raises:
            UserError: ``freeze_at`` is negative, or the model is not a chain of such stages.
        """
        if freeze_at < 0:
            raise UserError(f"freeze_at (MODEL.BACKBONE.FREEZE_AT) is {freeze_at}; expected 0 or more")
        if freeze_at == 0:
            return set()
        parameters = dict(self.body.named_parameters())
        maps = self.body(self._images())
        leads_to = []
        for i in self.indices.values():
            gradients = torch.autograd.grad(
                maps[i].sum(), list(parameters.values()), allow_unused=True, retain_graph=True
            )
            leads_to.append({name for name, grad in zip(parameters, gradients, strict=True) if grad is not None})
        stages = [found for name, found in zip(self.indices, leads_to, strict=True) if int(name[3:]) <= freeze_at]
        if freeze_at > 1 and any(not finer <= coarser for finer, coarser in zip(leads_to, leads_to[1:], strict=False)):
            raise UserError(
                f"freeze_at (MODEL.BACKBONE.FREEZE_AT) is {freeze_at}, but the maps of this model come from parallel "
                "branches, not from stages one after the other; set it to 0 or 1"
            )
        # Below the first map there is no more than the stem.
        frozen = stages[-1] if stages else {name for name in leads_to[0] if STEM.match(name)}
        if not frozen:
            raise UserError(
                f"freeze_at (MODEL.BACKBONE.FREEZE_AT) is {freeze_at}, but it cannot be told which layers of this "
                f"model are its stem; set it to 0, or to {next(iter(self.indices))[3:]} or more"
            )
        return frozen


def _convert_norms(body: nn.Module, norm: str, name: str) -> nn.Module:
    if not norm:
        return body
    from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

    if not any(isinstance(module, nn.BatchNorm2d) for module in body.modules()):
        raise UserError(f"norm (MODEL.TIMM.NORM) is {norm!r}, but timm's {name} has no batch norm; leave it empty")
    return freeze_batch_norm_2d(body) if norm == "FrozenBN" else convert_sync_batchnorm(body)


def _freeze(body: nn.Module, frozen: set[str]) -> None:
    """Freeze the parameters called ``frozen``, and the statistics of batch norms among them."""
    if not frozen:
        return
    from timm.layers import freeze_batch_norm_2d

    for name, parameter in body.named_parameters():
        if name in frozen:
            parameter.requires_grad = False
    for name, module in list(body.named_modules()):
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and f"{name}.weight" in frozen:
            parent, _, child = name.rpartition(".")
            setattr(body.get_submodule(parent), child, freeze_batch_norm_2d(module))


def turn_on_checkpointing(model: nn.Module, name: str) -> None:
    """Let the timm model ``name`` recompute its maps in the backward pass.

    Raises:
        UserError: it cannot.
    """
    reentrant = getattr(importlib.import_module("timm.layers"), "use_reentrant_ckpt", None)
    if reentrant is None or reentrant():
        # Of that kind, nothing behind a frozen part gets a gradient.
        raise UserError(
            "MODEL.BACKBONE.GRADIENT_CHECKPOINTING needs a timm that checkpoints without re-entering autograd: install "
            "a newer one, or set the key to False"
        )
    try:
        model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as error:
        raise UserError(
            f"timm's {name} cannot do MODEL.BACKBONE.GRADIENT_CHECKPOINTING ({error}); set it to False"
        ) from None


@register_bottom_up
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """Build the timm model ``cfg.MODEL.TIMM.NAME``.

    Raises:
        UserError: it cannot be had as the configuration asks, or its weights expect other images.
    """
    return TimmBackbone(
        out_features=cfg.MODEL.TIMM.OUT_FEATURES,
        in_channels=input_shape.channels,
        norm=cfg.MODEL.TIMM.NORM,
        **timm_arguments(cfg),
    )
