"""A detector that takes some hundredths of a second for an iteration, and whose checkpoints have some 100 KB.

``python -m tests.tiny ...`` is train_net.py, which knows it too.
"""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from .engine.small import MODEL


class Tiny(Backbone):
    """Four convolutions."""

    def __init__(self, channels: int = 4):
        super().__init__()
        self._out_feature_strides = {f"res{k}": 2**k for k in (2, 3, 4, 5)}
        self._out_feature_channels = dict.fromkeys(self._out_feature_strides, channels)
        self._out_features = list(self._out_feature_strides)
        strides = (4, 2, 2, 2)
        self.stages = nn.ModuleList(
            nn.Conv2d(3 if k == 0 else channels, channels, stride + 1, stride, stride // 2)
            for k, stride in enumerate(strides)
        )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        maps = {}
        for name, stage in zip(self._out_features, self.stages, strict=True):
            image = maps[name] = stage(image).relu()
        return maps


@BACKBONE_REGISTRY.register()
def build_tiny_backbone(cfg: object, input_shape: ShapeSpec) -> Tiny:
    return Tiny()


_SMALL = MODEL["MODEL"]
TINY = {
    **_SMALL,
    "FPN": {**_SMALL["FPN"], "BOTTOM_UP": "build_tiny_backbone", "OUT_CHANNELS": 4},
    "ROI_BOX_HEAD": {**_SMALL["ROI_BOX_HEAD"], "FC_DIM": 4, "POOLER_RESOLUTION": 2},
}

if __name__ == "__main__":
    import train_net

    train_net.main()
