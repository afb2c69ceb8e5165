"""Path Aggregation Network (Liu et al., CVPR 2018, section 3.1 and figure 1b): an FPN and a second bottom-up path.

Shape legend, beside that of :mod:`.fpn`:
    n{k}     output of level k: (N, d, as res{k}); n of the finest level is p of the finest level
"""

from collections.abc import Sequence

import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling.backbone import Backbone
from torch import Tensor

from .build import NECK_REGISTRY
from .fpn import FPN
from .parts import fit, xavier_conv


@NECK_REGISTRY.register()
class PAFPN(FPN):
    """FPN, then from fine to coarse: N_{k+1} = ReLU(conv3x3(P_{k+1} + ReLU(conv3x3/2(N_k)))), with N_min = P_min.

    Child modules are those of :class:`FPN`, so that its checkpoints load, with ``pafpn_down{k}`` (the stride-2
    convolution from level k to k + 1) and ``pafpn_output{k}`` beside them. The outputs keep the names ``p{k}``, so
    that configurations need not change. The top block reads C5, or N5 where it reads P5 in the FPN.

    Each of the new convolutions is followed by a ReLU, as the paper says. Its authors' code has the ReLU only
    together with group norm; mmdetection's PAFPN has none unless ``act_cfg`` asks for it, which then also puts one
    after the convolutions of the FPN. For its outputs set ``activation=None`` on the new convolutions.
    """

    @configurable
    def __init__(
        self,
        bottom_up: Backbone,
        *,
        in_features: Sequence[str],
        out_channels: int = 256,
        norm: str = "",
        **fpn_options,
    ):
        """Build the neck.

        Args:
            bottom_up: the bottom-up pathway.
            in_features: names of the maps to use, from high to low resolution; strides double.
            out_channels: d, the channels of every output.
            norm: norm after each convolution, of the new path too; empty: none.
            **fpn_options: the other options of :class:`FPN`. With ``out_features`` the new path ends at the coarsest
                level that is wanted.

        Raises:
            UserError: as :class:`FPN`.
        """
        super().__init__(bottom_up, in_features=in_features, out_channels=out_channels, norm=norm, **fpn_options)
        for level in self._output_levels[:-1]:
            down = xavier_conv(out_channels, out_channels, 3, norm, stride=2, activation=F.relu)
            output = xavier_conv(out_channels, out_channels, 3, norm, activation=F.relu)
            self.add_module(f"pafpn_down{level}", down)
            self.add_module(f"pafpn_output{level + 1}", output)
        self.own(bottom_up, in_features, self.output_shape())

    def _levels_for(self, needed: set[int]) -> list[int]:
        # A level depends on all finer ones.
        return [k for k in self.levels if needed and k <= max(needed)]

    def _outputs(self, features: dict[str, Tensor]) -> dict[int, Tensor]:
        outputs = super()._outputs(features)
        for level in self._output_levels[:-1]:
            finer, p = outputs[level], outputs[level + 1]
            down = fit(getattr(self, f"pafpn_down{level}")(finer), p.shape[-2:], "nearest")
            outputs[level + 1] = getattr(self, f"pafpn_output{level + 1}")(p + down)
        return outputs
