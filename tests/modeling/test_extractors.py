"""Every rule and extractor that is registered, against a slow reference: one RoI, one level, one cell at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes
from torchvision.ops import roi_align

from fpn_d2.errors import UserError
from fpn_d2.modeling import ROI_RULE_REGISTRY, CombiningROIPooler, build_pooler
from fpn_d2.modeling.extractors import AllMax, GRoIE, ROIExtractor, Soft
from fpn_d2.modeling.roi_rules import extracted_channels

from .test_poolers import box_lists, maps
from .test_roi_heads import config

NAMES = sorted(name for name, _ in ROI_RULE_REGISTRY)
EXTRACTORS = [name for name in NAMES if issubclass(ROI_RULE_REGISTRY.get(name), ROIExtractor)]
WITH_PARAMETERS = ["all_max", "groie"]
C = 3


def pooler_of(name, levels=(2, 3, 4, 5), output_size=(2, 3), adapt_conv=True, randomise=True, channels=C):
    cfg = config(*["MODEL.ROI_LEVEL_ASSIGN.NAME", name, "MODEL.ROI_LEVEL_ASSIGN.ADAPT_CONV", adapt_conv])
    cfg.MODEL.ROI_HEADS.IN_FEATURES = [f"p{k}" for k in levels]
    shapes = {f"p{k}": ShapeSpec(channels=channels, stride=2**k) for k in levels}
    pooler = build_pooler(cfg, shapes, output_size=output_size, sampling_ratio=2, pooler_type="ROIAlignV2")
    if randomise:  # zeros that a layer starts with would hide mistakes behind it
        generator = torch.Generator().manual_seed(5)
        for parameter in pooler.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 10
            parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
    return pooler


# ---- The references: `cells[i]` is what one RoI gives on level i, (C, h, w); `k` its place on the canonical scale ----


def canonical(cells, k, levels, pooler):
    k = min(max(math.floor(k), levels[0]), levels[-1])
    return cells[levels.index(max(level for level in levels if level <= k))]


def finest(cells, k, levels, pooler):
    return cells[0]


def soft(cells, k, levels, pooler):
    if k <= levels[0]:
        return cells[0]
    if k >= levels[-1]:
        return cells[-1]
    i = max(i for i, level in enumerate(levels) if level <= k)
    share = (k - levels[i]) / (levels[i + 1] - levels[i])
    return (1 - share) * cells[i] + share * cells[i + 1]


def all_sum(cells, k, levels, pooler):
    out = torch.zeros_like(cells[0])
    for level in cells:
        out = out + level
    return out


def all_concat(cells, k, levels, pooler):
    return torch.cat(cells)


def convolve(cells, weight, bias):
    """A convolution with zeros round the border, as a sum over every tap."""
    outputs, _, size, _ = weight.shape
    _, height, width = cells.shape
    padded = F.pad(cells, [size // 2] * 4)
    out = bias[:, None, None].expand(outputs, height, width)
    for y in range(size):
        for x in range(size):
            out = out + torch.einsum("oc,chw->ohw", weight[:, :, y, x], padded[:, y : y + height, x : x + width])
    return out


def all_max(cells, k, levels, pooler):
    parameters = dict(pooler.named_parameters())
    if parameters:
        named = [(f"extractor.adapt.p{level}.weight", f"extractor.adapt.p{level}.bias") for level in levels]
        cells = [
            convolve(level, parameters[w], parameters[b]).clamp(min=0)
            for level, (w, b) in zip(cells, named, strict=True)
        ]
    return torch.stack(cells).max(dim=0).values


def groie(cells, k, levels, pooler):
    p = {key.removeprefix("extractor."): value for key, value in pooler.named_parameters()}
    x = sum(convolve(level, p["pre.weight"], p["pre.bias"]).clamp(min=0) for level in cells)
    theta, phi, g = (convolve(x, p[f"post.{n}.weight"], p[f"post.{n}.bias"]) for n in ("theta", "phi", "g"))
    y = []
    for row in range(x.shape[1]):
        for column in range(x.shape[2]):
            likeness = (theta[:, row, column][:, None, None] * phi).sum(0).exp()
            y.append((likeness * g).sum((1, 2)) / likeness.sum())
    y = torch.stack(y, dim=1).reshape(-1, x.shape[1], x.shape[2])
    return x + convolve(y, p["post.out.weight"], p["post.out.bias"])


REFERENCES = {f.__name__: f for f in (canonical, finest, soft, all_sum, all_concat, all_max, groie)}


def row_by_row(name, x, lists, pooler):
    rows = []
    for image, boxes in enumerate(lists):
        for box in boxes.tensor.double():
            side = float(((box[2] - box[0]) * (box[3] - box[1])) ** 0.5)
            roi = torch.cat([torch.zeros(1), box])[None]
            cells = []
            for level, level_map in zip(pooler.levels, x, strict=True):
                one = level_map[image : image + 1]
                cells.append(roi_align(one, roi.to(one.dtype), pooler.output_size, 0.5**level, 2, aligned=True)[0])
            rows.append(REFERENCES[name](cells, 4 + math.log2(side / 224), list(pooler.levels), pooler))
    return torch.stack(rows)


def test_every_registered_name_has_a_reference():
    """A rule or an extractor that is added gets its reference here; everything below then tests it."""
    assert sorted(REFERENCES) == NAMES


def cases():
    return [(name, True) for name in NAMES] + [("all_max", False)]


@pytest.mark.parametrize("levels", [(2, 3, 4, 5), (2, 5), (2, 4, 5), (4,)])
@pytest.mark.parametrize("name,adapt_conv", cases())
def test_row_by_row_with_gradients(name, adapt_conv, levels):
    pooler = pooler_of(name, levels, adapt_conv=adapt_conv).double()
    lists = box_lists((7, 5))
    results = []
    for function in (pooler, lambda x, lists: row_by_row(name, x, lists, pooler)):
        x = [m.requires_grad_() for m in maps(levels, channels=C, dtype=torch.float64)]
        out = function(x, lists)
        generator = torch.Generator().manual_seed(2)
        (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum().backward()
        results.append([out, *(m.grad for m in x), *(p.grad for p in pooler.parameters())])
        pooler.zero_grad(set_to_none=True)
    assert results[0][0].shape == (12, C * len(levels) if name == "all_concat" else C, 2, 3)
    for actual, expected in zip(*results, strict=True):
        if actual is None or expected is None:  # a level that no RoI is pooled from
            assert (actual is None or not actual.any()) and (expected is None or not expected.any())
            continue
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)  # the weights of `soft` are of float32 boxes
    if list(pooler.parameters()):
        assert all(gradient.abs().sum() > 0 for gradient in results[0][1 + len(levels) :])


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_gradcheck_float64(name):
    pooler = pooler_of(name, (3, 4), channels=2).double()
    x = [m.requires_grad_() for m in maps((3, 4), images=1, channels=2, size=(32, 40), dtype=torch.float64)]
    boxes = [Boxes(torch.tensor([[3.0, 5.0, 30.0, 28.0]]))]
    assert torch.autograd.gradcheck(lambda *m: pooler(list(m), boxes), x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (3, 0)])
def test_images_without_boxes(name, counts):
    pooler, x, lists = pooler_of(name), maps(channels=C), box_lists(counts)
    pooled = pooler(x, lists)
    assert pooled.shape == (sum(counts), 4 * C if name == "all_concat" else C, 2, 3)
    if sum(counts):
        torch.testing.assert_close(pooled, row_by_row(name, x, lists, pooler), rtol=1e-4, atol=1e-5)
    if list(pooler.parameters()):  # distributed training waits for a gradient of every parameter
        pooled.sum().backward()
        assert all(p.grad is not None for p in pooler.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_batch_without_images(name):
    assert pooler_of(name)(maps(channels=C, images=0), []).shape == (0, 4 * C if name == "all_concat" else C, 2, 3)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_boxes_and_maps(name):
    pooler, x, lists = pooler_of(name), maps(channels=C), box_lists((4, 0))
    exact = [boxes.clone() for boxes in lists]
    for boxes, same in zip(lists, exact, strict=True):
        boxes.tensor = boxes.tensor.half()
        same.tensor = boxes.tensor.float()
    assert torch.equal(pooler(x, lists), pooler(x, exact))
    half = pooler.bfloat16()([m.bfloat16() for m in x], exact)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), pooler.float()(x, exact), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_images_does_not_matter(name):
    pooler, x, lists = pooler_of(name), maps(channels=C), box_lists((4, 3))
    pooled = pooler(x, lists)
    swapped = pooler([m.flip(0) for m in x], lists[::-1])
    torch.testing.assert_close(torch.cat([swapped[3:], swapped[:3]]), pooled, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_not_finite_is_an_error(name):
    lists = box_lists((2, 2))
    lists[1].tensor[1, 0] = math.nan
    with pytest.raises(UserError, match="image 1 .*row 1"):
        pooler_of(name)(maps(channels=C), lists)


@pytest.mark.parametrize("name", NAMES)
def test_no_trace_of_a_batch(name):
    pooler, x, lists = pooler_of(name), maps(channels=C), box_lists((4, 3))
    before = {key: value.clone() for key, value in pooler.state_dict().items()}
    first = pooler(x, lists)
    pooler(maps(channels=C, seed=9, size=(64, 96)), [Boxes(torch.tensor([[1.0, 2, 60, 50]])), Boxes(torch.zeros(0, 4))])
    assert torch.equal(pooler(x, lists), first)
    after = pooler.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert bool(after) == (name in WITH_PARAMETERS)


@pytest.mark.parametrize("name", NAMES)
def test_traces(name):
    class OfTensors(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pooler = pooler_of(name)

        def forward(self, p2, p3, p4, p5, boxes):
            return self.pooler([p2, p3, p4, p5], [Boxes(boxes)])

    module, x = OfTensors(), maps(channels=C, images=1)
    traced = torch.jit.trace(module, (*x, box_lists((4,))[0].tensor), check_trace=False)
    for count in (9, 1):
        boxes = box_lists((count,), seed=count)[0].tensor
        torch.testing.assert_close(traced(*x, boxes), module(*x, boxes), rtol=1e-5, atol=1e-6)


# ---- soft ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", [112, 224, 448])
def test_soft_has_no_jump_where_canonical_has_one(boundary):
    x = maps(channels=C, images=1, size=(512, 512))

    def pooled(name, side):
        return pooler_of(name)(x, [Boxes(torch.tensor([[10.0, 20.0, 10.0 + side, 20.0 + side]]))])

    below, at, above = (boundary * factor for factor in (1 - 1e-5, 1, 1 + 1e-5))
    step = (pooled("soft", below) - pooled("soft", at)).abs().max()
    assert max(step, (pooled("soft", above) - pooled("soft", at)).abs().max()) < 1e-3
    assert (pooled("canonical", below) - pooled("canonical", at)).abs().max() > 0.1
    torch.testing.assert_close(pooled("soft", at), pooled("canonical", at), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", [1, 30, 56, 896, 2000])
def test_soft_is_canonical_beyond_the_ends(side):
    x, lists = maps(channels=C, images=1), [Boxes(torch.tensor([[0.0, 0.0, side, side]]))]
    assert torch.equal(pooler_of("soft")(x, lists), pooler_of("canonical")(x, lists))


def test_soft_weights():
    weights = Soft((2, 3, 4, 5), C).weights(torch.tensor([112.0, 224 * 2**0.25, 448.0, 0.0, 1e5, 112 * 2**0.5]) ** 2)
    expected = [[0, 1, 0, 0], [0, 0, 0.75, 0.25], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0.5, 0.5, 0]]
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=0, atol=1e-6)
    assert torch.equal(weights[0], torch.tensor([0.0, 1, 0, 0]))
    scaled = Soft((2, 3, 4, 5), C, canonical_box_size=56, canonical_level=3).weights(torch.tensor([56.0**2 * 2]))
    torch.testing.assert_close(scaled, torch.tensor([[0, 0.5, 0.5, 0]]))


def test_soft_pools_a_roi_only_from_levels_it_has_a_part_of():
    boxes = torch.tensor([[0.0, 0, 112, 112], [0, 0, 150, 150], [0, 0, 20, 20], [0, 0, 900, 900]])
    asked = {}

    def pool(level_index, rows):
        asked[level_index] = rows.tolist()
        return torch.ones(len(rows), C, 1, 1)

    out = Soft((2, 3, 4, 5), C)(pool, [Boxes(boxes)])
    assert asked == {0: [2], 1: [0, 1], 2: [1], 3: [3]}
    torch.testing.assert_close(out, torch.ones(4, C, 1, 1))


# ---- Construction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXTRACTORS)
def test_plain_arguments_build_what_the_configuration_builds(name):
    build = ROI_RULE_REGISTRY.get(name)
    pooler = CombiningROIPooler((2, 3), [1 / 4, 1 / 8, 1 / 16, 1 / 32], 2, "ROIAlignV2", lambda ks: build(ks, C))
    from_config = pooler_of(name)
    pooler.load_state_dict(from_config.state_dict(), strict=True)
    assert isinstance(pooler.extractor, ROIExtractor)
    x, lists = maps(channels=C), box_lists((4, 3))
    assert torch.equal(pooler(x, lists), from_config(x, lists))


@pytest.mark.parametrize("extractor", [AllMax, GRoIE, Soft])
@pytest.mark.parametrize("levels,channels", [((), C), ((3, 2), C), ((2, 2), C), ((2, 3), 0)])
def test_construction_refuses(extractor, levels, channels):
    with pytest.raises(UserError, match="expected"):
        extractor(levels, channels)


def test_soft_refuses_a_size_that_is_not_positive():
    with pytest.raises(UserError, match="CANONICAL_BOX_SIZE.* is 0"):
        Soft((2, 3), C, canonical_box_size=0)


def test_groie_starts_without_attention():
    block = GRoIE((2, 3), 8).post
    x = torch.randn(2, 8, 3, 3)
    assert torch.equal(block(x), x)


# ---- Memory: the table at the head of extractors.py ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,adapt_conv,kept",
    [
        ("canonical", True, lambda levels, attention: 0),
        ("finest", True, lambda levels, attention: 0),
        ("all_sum", True, lambda levels, attention: 0),
        ("all_max", False, lambda levels, attention: 2 * levels - 2),
        ("all_max", True, lambda levels, attention: 3 * levels - 2),
        ("all_concat", True, lambda levels, attention: 0),
        ("groie", True, lambda levels, attention: 2 * levels + 3 + attention),
        ("soft", True, lambda levels, attention: 0),
    ],
)
def test_memory_kept_for_the_backward_pass_is_as_documented(name, adapt_conv, kept, monkeypatch):
    # Beside what pooling keeps, which without a compiler is more.
    monkeypatch.setenv("FPN_D2_ROI_ALIGN", "torchvision")
    channels, cells = 16, 8 * 8
    pooler = pooler_of(name, adapt_conv=adapt_conv, output_size=(8, 8), channels=channels)
    x = [m.requires_grad_() for m in maps(channels=channels)]
    lists = box_lists((30, 20))
    inputs = {tensor.untyped_storage().data_ptr() for tensor in [*x, *pooler.parameters()]}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = pooler(x, lists)
    given = saved.pop(out.untyped_storage().data_ptr(), 0)  # the head keeps that anyway
    one = 50 * channels * cells * 4
    assert given in (0, out.numel() * 4)
    assert sum(saved.values()) / one == pytest.approx(kept(4, cells / channels), abs=0.05)


# ---- A rule of one's own ---------------------------------------------------------------------------------------------


@pytest.fixture
def rule_of_ones_own(monkeypatch):
    def register(rule):
        monkeypatch.setitem(ROI_RULE_REGISTRY._obj_map, "own", rule)
        return config("MODEL.ROI_LEVEL_ASSIGN.NAME", "own")

    return register


def build(cfg):
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p4"]
    shapes = {name: ShapeSpec(channels=C, stride=2 ** int(name[1])) for name in ("p2", "p3", "p4")}
    return build_pooler(cfg, shapes, output_size=2, sampling_ratio=2, pooler_type="ROIAlignV2")


def test_a_rule_reads_keys_of_its_own(rule_of_ones_own):
    class Coarsest:
        def __init__(self, levels, offset):
            self.levels, self.offset = levels, offset

        @classmethod
        def from_config(cls, cfg, levels, channels):
            assert channels == C
            return {"levels": levels, "offset": cfg.MODEL.ROI_LEVEL_ASSIGN.MY_OFFSET}

    cfg = rule_of_ones_own(Coarsest)
    cfg.MODEL.ROI_LEVEL_ASSIGN.MY_OFFSET = 7
    assigner = build(cfg).assigner
    assert type(assigner) is Coarsest and (assigner.levels, assigner.offset) == ((2, 4), 7)


def test_an_extractor_reads_keys_of_its_own_and_the_heads_are_built_for_it(rule_of_ones_own):
    class Twice(ROIExtractor):
        def __init__(self, levels, channels, times):
            super().__init__(levels, channels, out_channels=times * channels)

        @classmethod
        def from_config(cls, cfg, levels, channels):
            return super().from_config(cfg, levels, channels) | {"times": cfg.MODEL.ROI_LEVEL_ASSIGN.MY_TIMES}

        def forward(self, pool, box_lists):
            return torch.cat([pool(0)] * (self.out_channels // self.channels), dim=1)

    cfg = rule_of_ones_own(Twice)
    cfg.MODEL.ROI_LEVEL_ASSIGN.MY_TIMES = 3
    assert build(cfg).extractor.levels == (2, 4)
    assert extracted_channels(cfg, (2, 4), C) == 3 * C


@pytest.mark.parametrize("rule", [lambda levels, channels: None, type("Bare", (), {})])
def test_what_cannot_be_built_from_a_configuration_is_refused(rule_of_ones_own, rule):
    with pytest.raises(UserError, match="ROI_LEVEL_ASSIGN.NAME own: expected a class with from_config"):
        build(rule_of_ones_own(rule))


def test_an_option_that_is_misspelt_is_an_error(rule_of_ones_own):
    class Misspelt(AllMax):
        @classmethod
        def from_config(cls, cfg, levels, channels):
            return {"levels": levels, "channels": channels, "adpt_conv": False}

    with pytest.raises(TypeError, match="adpt_conv"):
        build(rule_of_ones_own(Misspelt))
