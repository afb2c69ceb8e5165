"""A frozen bottom-up pathway that looks at each image once: its maps are kept in files and read from then on.

What a frozen pathway makes of an image never changes, so that all variants of a study, and all their epochs, can share
it. An image is known by the bytes that reach the pathway, after flips and normalisation: nothing has to be told about
augmentation, and what has not been seen is computed.
"""

import hashlib
import os
from pathlib import Path

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn

from fpn_d2.errors import UserError
from fpn_d2.fast.guard import autocast_dtype
from fpn_d2.files import UNFINISHED


class KeptMaps(Backbone):
    """The maps of a frozen bottom-up pathway, from files where they are there.

    Images go through the pathway one at a time, so that what is kept does not depend on the batch. Processes may share
    the folder: files appear whole.
    """

    def __init__(self, bottom_up: Backbone, folder: str | os.PathLike):
        """
        Args:
            bottom_up: Whose maps these are. All parameters must be frozen, and norms must have fixed statistics.
            folder: Where the files are kept. Each pathway, by its tensors and precision, has a folder of its own there.

        Raises:
            UserError: It has parameters or statistics that a training changes.
        """
        super().__init__()
        moving = [name for name, parameter in bottom_up.named_parameters() if parameter.requires_grad]
        norms = nn.modules.batchnorm._NormBase
        moving += [name for name, module in bottom_up.named_modules() if isinstance(module, norms)]
        if moving:
            raise UserError(
                f"maps can be kept of a frozen bottom-up pathway only, and {moving[0]} of {len(moving)} may change: "
                "set MODEL.BACKBONE.FREEZE_AT to 5"
            )
        self.bottom_up = bottom_up.eval()
        self._folder = Path(folder)
        self._identity = _digest(*bottom_up.state_dict().values(), text=repr(bottom_up))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The maps of images (N, 3, H, W), as the pathway would give them, without gradient."""
        maps = [self._of_one(x[i : i + 1]) for i in range(len(x))]
        return {name: torch.cat([one[name] for one in maps]) for name in maps[0]}

    def train(self, mode: bool = True) -> "KeptMaps":
        """The pathway itself stays as it is in use: nothing random in it."""
        super().train(mode)
        self.bottom_up.eval()
        return self

    def _of_one(self, image: Tensor) -> dict[str, Tensor]:
        precision = autocast_dtype(image.device.type) or image.dtype
        key = _digest(image, text=str(tuple(image.shape)))
        file = self._folder / f"{self._identity}_{str(precision).rpartition('.')[2]}" / key[:2] / f"{key}.pt"
        if file.exists():
            return torch.load(file, weights_only=True, map_location=image.device)
        with torch.no_grad():
            maps = {name: value.contiguous() for name, value in self.bottom_up(image).items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = f"{file}{UNFINISHED}.{os.getpid()}"
        torch.save(maps, unfinished)
        os.replace(unfinished, file)
        return maps

    def output_shape(self) -> dict[str, ShapeSpec]:
        """As the pathway's."""
        return self.bottom_up.output_shape()

    @property
    def size_divisibility(self) -> int:
        """As the pathway's."""
        return self.bottom_up.size_divisibility


def _digest(*tensors: Tensor, text: str) -> str:
    digest = hashlib.sha256(text.encode())  # which processors of today have instructions for
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
