"""A package with the weights of EfficientNet-lite0, made up: the file has random numbers under the real one's names."""

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch

from fpn_d2.modeling.bottom_up.packaged_weights import PACKAGES

# Table 1 of the EfficientNet paper, without its squeeze and excitation: repeats, kernel, stride, expansion, channels.
STAGES = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]


def layers(stages):
    """The layers of the file: name, shape of the weight, and whether a batch norm."""
    found = [("_conv_stem", (32, 3, 3, 3), False), ("_bn0", (32,), True)]
    channels, block = 32, 0
    for repeats, kernel, _, expansion, out in stages:
        for _ in range(repeats):
            wide, own = channels * expansion, []
            if expansion > 1:
                own += [("_expand_conv", (wide, channels, 1, 1), False), ("_bn0", (wide,), True)]
            own += [("_depthwise_conv", (wide, 1, kernel, kernel), False), ("_bn1", (wide,), True)]
            own += [("_project_conv", (out, wide, 1, 1), False), ("_bn2", (out,), True)]
            found += [(f"_blocks.{block}.{name}", shape, norm) for name, shape, norm in own]
            channels, block = out, block + 1
    return [*found, ("_conv_head", (1280, channels, 1, 1), False), ("_bn1", (1280,), True)]


def random_file(stages=STAGES):
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape, norm in layers(stages):
        fan = shape[1] * shape[2] * shape[3] if not norm else 1
        state[f"{name}.weight"] = (
            torch.randn(shape, generator=generator) * (2 / fan) ** 0.5
            if not norm
            else (torch.rand(shape, generator=generator) + 0.5)
        )
        if norm:
            state[f"{name}.bias"] = 0.1 * torch.randn(shape, generator=generator)
            state[f"{name}.running_mean"] = 0.1 * torch.randn(shape, generator=generator)
            state[f"{name}.running_var"] = torch.rand(shape, generator=generator) + 0.5
            state[f"{name}.num_batches_tracked"] = torch.tensor(7)
    state["_fc.weight"], state["_fc.bias"] = torch.randn(1000, 1280, generator=generator), torch.zeros(1000)
    return state


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, state: dict, *, version="0.1.0", known=True, file=None):
    """Install a package with a file of these weights, before a real one; its hash is made the known one, or not."""
    package = PACKAGES["efficientnet_lite0"]
    info = folder / f"{package.distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.distribution}\nVersion: {version}\n")
    path = folder / (file or package.file)
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    (path.parents[1] / "__init__.py").write_text("raise RuntimeError('its code is run')")
    if known:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setitem(PACKAGES, "efficientnet_lite0", dataclasses.replace(package, sha256=digest))
    monkeypatch.syspath_prepend(folder)
