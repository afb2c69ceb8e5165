"""What every neck in the registry keeps to. A neck that is registered is tested here by existing.

Each is built through ``build_fpn_backbone`` on a small bottom-up pathway with random weights, because some necks run
that pathway themselves. A neck that takes other maps than res2 to res5 says so in ``CASES``.
"""

import copy
import inspect
import math
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
import yaml
from detectron2.config import get_cfg
from detectron2.layers import get_norm
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone
from detectron2.modeling.backbone import Backbone
from torch import nn

from fpn_d2.config import add_fpn_d2_config
from fpn_d2.errors import UserError
from fpn_d2.modeling import NECK_REGISTRY, Neck

from .maps import randomise

NECKS = sorted(name for name, _ in NECK_REGISTRY)
# For necks that cannot take the four maps of a ResNet: the maps for a configuration, and for plain arguments alone.
CASES = {
    "NASFPN": {"plain": ["res3", "res4", "res5"]},
    "SimpleFeaturePyramid": {"maps": ["res4"]},
    "ImagePyramid": {"maps": ["res4"]},
}
# Necks with a map that every cell of the image can change, however far away it is.
SEES_WHOLE_IMAGE = {"NASFPN"}
SIZES = [(64, 96), (65, 97), (33, 127), (1, 1)]


class SmallBottomUp(Backbone):
    """res2 to res5 by one strided convolution each; sizes round up, as a ResNet's do."""

    def __init__(self):
        super().__init__()
        widths = {"res2": 8, "res3": 16, "res4": 64, "res5": 32}
        self.stages = nn.ModuleDict()
        channels = 3
        for name, width in widths.items():
            kernel, stride = (5, 4) if name == "res2" else (3, 2)
            self.stages[name] = nn.Conv2d(channels, width, kernel, stride, kernel // 2)
            channels = width
        self._out_features = list(widths)
        self._out_feature_channels = widths
        self._out_feature_strides = {name: 4 * 2**i for i, name in enumerate(widths)}

    def forward(self, x):
        maps = {}
        for name, stage in self.stages.items():
            x = maps[name] = torch.tanh(stage(x))
        return maps


def build_small_bottom_up(cfg, input_shape):
    return SmallBottomUp()


@pytest.fixture(scope="module", autouse=True)
def small_bottom_up():
    """Registered while these tests run, so that no other test sees it."""
    BACKBONE_REGISTRY.register(build_small_bottom_up)
    yield
    del BACKBONE_REGISTRY._obj_map["build_small_bottom_up"]


def config(name, **options):
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_fpn_backbone"
    cfg.MODEL.DEVICE = "cpu"
    fpn = {
        "BOTTOM_UP": "build_small_bottom_up",
        "NECK": name,
        "IN_FEATURES": CASES.get(name, {}).get("maps", ["res2", "res3", "res4", "res5"]),
        "OUT_CHANNELS": 32,
    }
    for key, value in (fpn | options).items():
        cfg.MODEL.FPN[key] = value
    return cfg


def build(name, seed=0, **options):
    torch.manual_seed(seed)
    return build_backbone(config(name, **options))


def images(height=65, width=97, n=2, seed=3, dtype=torch.float32):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def check_shapes(outputs, declared, size):
    assert list(outputs) == list(declared)
    for name, shape in declared.items():
        assert outputs[name].shape[1] == shape.channels, name
        assert outputs[name].shape[2:] == tuple(math.ceil(side / shape.stride) for side in size), name


def test_the_necks_are_there():
    assert {"FPN", "PAFPN", "BiFPN", "NASFPN"} <= set(NECKS)


@pytest.mark.parametrize("name", NECKS)
def test_builds_from_yaml(name, tmp_path):
    path = tmp_path / "neck.yaml"
    fpn = dict(config(name).MODEL.FPN)
    path.write_text(yaml.safe_dump({"MODEL": {"BACKBONE": {"NAME": "build_fpn_backbone"}, "FPN": fpn}}))
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.merge_from_file(str(path))
    backbone = build_backbone(cfg)
    assert isinstance(backbone, Neck) and type(backbone).__name__ == name
    strides = [shape.stride for shape in backbone.output_shape().values()]
    assert list(backbone.output_shape()) == [f"p{int(math.log2(stride))}" for stride in strides]
    assert all(b == 2 * a for a, b in zip(strides, strides[1:], strict=False))
    assert backbone.size_divisibility % 2 == 0


@pytest.mark.parametrize("name", NECKS)
def test_builds_from_plain_arguments(name):
    """With the maps and the channels alone; and, with what the configuration says, the same as from that."""
    neck_class = NECK_REGISTRY.get(name)
    bottom_up = SmallBottomUp()
    case = CASES.get(name, {})
    in_features = case.get("plain", case.get("maps", ["res2", "res3", "res4", "res5"]))
    neck = neck_class(bottom_up, in_features=in_features, out_channels=8).eval()
    outputs = neck(images())
    check_shapes(outputs, neck.output_shape(), (65, 97))
    assert {x.shape[1] for x in outputs.values()} == {8}

    arguments = neck_class.from_config(config(name), bottom_up)
    parameters = inspect.signature(neck_class.__init__).parameters
    assert set(arguments) <= set(parameters) or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    neck = neck_class(**arguments)
    from_config = build(name)
    assert {name: p.shape for name, p in neck.state_dict().items()} == {
        name: p.shape for name, p in from_config.state_dict().items()
    }


@pytest.mark.parametrize("name", NECKS)
@pytest.mark.parametrize("size", SIZES)
def test_declared_shapes_are_real(name, size):
    backbone = build(name).eval()
    with torch.no_grad():
        check_shapes(backbone(images(*size)), backbone.output_shape(), size)


@pytest.mark.parametrize("name", NECKS)
def test_no_images(name):
    backbone = build(name).eval()
    with torch.no_grad():
        outputs = backbone(images(64, 96, n=0))
    check_shapes(outputs, backbone.output_shape(), (64, 96))
    assert all(x.shape[0] == 0 for x in outputs.values())


@pytest.mark.parametrize("name", NECKS)
@pytest.mark.parametrize("norm", ["", "GN", "BN", "SyncBN", "LN"])
def test_norms_and_gradients(name, norm):
    """Each norm builds, or is refused where this Detectron2 lacks it; every parameter then gets a gradient."""
    try:
        get_norm(norm, 32)
    except KeyError:
        if name != "SimpleFeaturePyramid":  # has an LN of its own
            with pytest.raises(UserError, match=f"NORM.*'{norm}'"):
                build(name, NORM=norm)
            return
    backbone = build(name, NORM=norm).train()
    norms = [m for m in backbone.modules() if isinstance(m, nn.GroupNorm | nn.modules.batchnorm._BatchNorm)]
    assert bool(norms) == (norm in ("GN", "BN", "SyncBN"))
    outputs = backbone(images(130, 194))
    generator = torch.Generator().manual_seed(5)
    sum((x * torch.randn(x.shape, generator=generator)).sum() for x in outputs.values()).backward()
    own = {key: p for key, p in backbone.named_parameters() if not key.startswith("bottom_up.")}
    without = [key for key, p in own.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert own and not without, f"no gradient reaches {without}"
    assert all(torch.isfinite(p.grad).all() for p in own.values())
    assert backbone.bottom_up.stages["res2"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NECKS)
@pytest.mark.parametrize("channels", [64, 128, 512])
def test_channels(name, channels):
    backbone = build(name, OUT_CHANNELS=channels, NORM="GN", REPEATS=1).eval()
    assert {shape.channels for shape in backbone.output_shape().values()} == {channels}
    with torch.no_grad():
        check_shapes(backbone(images(64, 64, n=1)), backbone.output_shape(), (64, 64))


@pytest.mark.parametrize("name", NECKS)
@pytest.mark.parametrize("norm", ["", "BN"])
def test_images_do_not_see_each_other(name, norm):
    """In evaluation mode: another neighbour changes no bit, another place in the batch, or none, no result."""
    backbone = randomise(build(name, NORM=norm, REPEATS=1)).eval().double()
    batch = images(dtype=torch.float64)
    other = torch.stack([batch[0], images(seed=4, dtype=torch.float64)[1] * 5])
    with torch.no_grad():
        outputs, beside, flipped, alone = map(backbone, (batch, other, batch.flip(0), batch[:1]))
    for level, x in outputs.items():
        assert torch.equal(beside[level][0], x[0]) and not torch.equal(beside[level][1], x[1])
        torch.testing.assert_close(flipped[level].flip(0), x)
        torch.testing.assert_close(alone[level], x[:1])


@pytest.mark.parametrize("name", NECKS)
def test_padding_changes_only_cells_near_it(name):
    """A batch is padded at the right and the bottom: cells far from that edge do not see what is there."""
    backbone = randomise(build(name, REPEATS=1)).eval().double()
    image = images(32, 4096, n=1, dtype=torch.float64)
    padded = F.pad(image, (0, 512))
    noise = image.clone()
    noise[..., 3584:] = 3.0
    with torch.no_grad():
        outputs, padded, changed = map(backbone, (image, padded, noise))
    near, far = [], []
    for level, x in outputs.items():
        half = x.shape[-1] // 2
        for other in (padded[level], changed[level]):
            far.append(torch.allclose(other[..., :half], x[..., :half], rtol=1e-9, atol=1e-12))
        near.append(torch.equal(changed[level][..., half:], x[..., half:]))
    assert not any(near)
    assert all(far) == (name not in SEES_WHOLE_IMAGE)


@pytest.mark.parametrize("name", NECKS)
def test_weights_survive_a_file(name, tmp_path):
    first, second = build(name, NORM="BN"), build(name, seed=1, NORM="BN")
    randomise(first)
    torch.save(first.state_dict(), tmp_path / "weights.pth")
    result = second.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    with torch.no_grad():
        for a, b in zip(first.eval()(images()).values(), second.eval()(images()).values(), strict=True):
            assert torch.equal(a, b)


def state_of(neck):
    """Everything that a neck and its parts hold beside parameters, buffers, children and hooks."""
    plain = set(vars(nn.Module()))
    return {
        f"{path}.{key}": repr(value)
        for path, module in neck.named_modules()
        for key, value in vars(module).items()
        if key not in plain
    }


@pytest.mark.parametrize("name", NECKS)
@pytest.mark.parametrize("train", [True, False])
def test_keeps_nothing_of_the_batch(name, train):
    backbone = build(name, NORM="GN").train(train)
    weights = {key: value.clone() for key, value in backbone.state_dict().items()}
    before = state_of(backbone)
    batch = images()
    outputs = backbone(batch)
    seen = [weakref.ref(x) for x in (batch, *outputs.values())]
    del batch, outputs
    assert all(ref() is None for ref in seen), "a map is still held"
    assert state_of(backbone) == before
    assert not any(isinstance(v, torch.Tensor) for m in backbone.modules() for v in vars(m).values())
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, weights[key]), key


@pytest.mark.parametrize("name", NECKS)
def test_copies_are_equal_and_apart(name):
    backbone = build(name).eval()
    with torch.no_grad():
        expected = backbone(images())
        for copied in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
            assert all(torch.equal(a, b) for a, b in zip(copied(images()).values(), expected.values(), strict=True))
            for parameter in copied.parameters():
                parameter.zero_()
            assert not any(torch.equal(a, b) for a, b in zip(copied(images()).values(), expected.values(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(backbone(images()).values(), expected.values(), strict=True))


@pytest.mark.parametrize("name", NECKS)
def test_a_step_lowers_the_loss(name):
    backbone = build(name, NORM="GN").train().double()
    batch = images(dtype=torch.float64)
    targets = {level: torch.randn_like(x) for level, x in backbone(batch).items()}

    def loss():
        return sum(F.mse_loss(x, targets[level]) for level, x in backbone(batch).items())

    before = loss()
    before.backward()
    torch.optim.SGD(backbone.parameters(), lr=1e-4).step()
    assert loss() < before


@pytest.mark.parametrize("name", NECKS)
def test_maps_that_are_not_there_are_refused(name):
    with pytest.raises(UserError, match=r"IN_FEATURES.*asks for res9.*res4 \(stride 16, 64 channels\)"):
        build(name, IN_FEATURES=["res9"])
