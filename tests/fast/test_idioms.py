"""What people do to a model: it works on a fast one as on Detectron2's own, at inference and in training.

Each is done to a small detector as built with MODEL.NUMERICS exact and to its twin under fast; what comes out agrees.
"""

import copy
import functools
import pickle

import pytest
import torch
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.structures import Boxes
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, vector_to_parameters

from fpn_d2.fast.apply import make_fast
from fpn_d2.fast.guard import Fast
from tests.batches import random_batch, seed_everything
from tests.modeling.test_roi_heads import config

OPTIONS = [
    *["MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.PROPOSAL_GENERATOR.NAME", "FPNRPN", "MODEL.BACKBONE.FREEZE_AT", 0],
    *["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.MASK_ON", False, "MODEL.KEYPOINT_ON", False],
]
SIZE = (96, 128)


@functools.cache
def built(numerics):
    """Wide enough that every operation of ours has something to do."""
    cfg = config(
        *["MODEL.NUMERICS", numerics, "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64],
        *["MODEL.RESNETS.WIDTH_PER_GROUP", 16],
        *["MODEL.RESNETS.STEM_OUT_CHANNELS", 16, "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.PIXEL_STD", [57.0] * 3, *OPTIONS],
    )
    seed_everything()
    model = build_model(cfg)
    for name, buffer in model.backbone.named_buffers():
        if name.endswith("norm.weight"):
            nn.init.uniform_(buffer, 0.3, 0.7)
    return cfg, model


def detector(numerics):
    cfg, model = built(numerics)
    return cfg, copy.deepcopy(model)


@pytest.fixture(params=[False, True], ids=["evaluation", "training"])
def pair(request):
    """The same detector twice, exact and fast, in one of both modes; each has computed before."""
    exact, fast = detector("exact")[1].train(request.param), detector("fast")[1].train(request.param)
    with torch.no_grad():
        maps(exact), maps(fast)
    return exact, fast


def images():
    return torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(3))


def maps(model, x=None):
    return model.backbone(images() if x is None else x)


def assert_same(pair, do=lambda model: None, tolerance=2e-5, run=maps):
    """Both give the same after ``do``, and something else than before it."""
    before = run(pair[1])
    results = []
    for model in pair:
        do(model)
        results.append(run(model))
    changed = 0.0
    for name, expected in results[0].items():
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(results[1][name], expected, rtol=0, atol=tolerance * max(scale, 1e-3))
        if name in before and before[name].shape == expected.shape:
            changed = max(changed, float((before[name] - expected).abs().max()) / max(scale, 1e-6))
    return changed


def halve(model):
    for parameter in model.parameters():
        parameter.data.mul_(0.5)


def move_average(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data * 0.9 + 0.01 * torch.ones_like(parameter)


def load_part(model):
    model.backbone.bottom_up.load_state_dict({k: v * 0.9 for k, v in model.backbone.bottom_up.state_dict().items()})


def step(model):
    optimizer = torch.optim.SGD(model.backbone.parameters(), lr=1e-3, momentum=0.9, fused=True)
    with torch.enable_grad():
        sum(value.mean() for value in maps(model).values()).backward()
    optimizer.step()


def share(model):
    model.backbone.fpn_output2.weight = model.backbone.fpn_output3.weight
    model.backbone.fpn_output3.weight.data.mul_(0.5)


WRITES = {
    "data": halve,
    "moving average": move_average,
    "set_": lambda model: [p.set_((p * 0.5).detach()) for p in model.parameters()],
    "copy_": lambda model: [p.copy_(p * 0.5) for p in model.parameters()],
    "load_state_dict": lambda model: model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()}),
    "part of a state dict": load_part,
    "fused optimizer": step,
    "vector_to_parameters": lambda model: vector_to_parameters(
        torch.linspace(-1e-2, 1e-2, sum(p.numel() for p in model.backbone.parameters())), model.backbone.parameters()
    ),
    "shared": share,
    "a frozen norm": lambda model: model.backbone.bottom_up.res2[0].conv1.norm.weight.mul_(2),
    "another parameter": lambda model: setattr(
        model.backbone.fpn_output2, "weight", nn.Parameter(model.backbone.fpn_output2.weight * 2)
    ),
}


@pytest.mark.parametrize("write", WRITES)
@torch.no_grad()
def test_weights_are_never_stale(pair, write):
    assert assert_same(pair, WRITES[write]) > 1e-3


@torch.no_grad()
def test_weights_are_never_stale_in_inference_mode(pair):
    with torch.inference_mode():
        assert assert_same(pair, halve) > 1e-3


@torch.no_grad()
def test_copies_and_pickles(pair):
    for other in (copy.deepcopy(pair[1]), pickle.loads(pickle.dumps(pair[1]))):
        assert [type(m) for m in other.modules()] == [type(m) for m in pair[1].modules()]
        halve(other)
        before = maps(pair[1])
        assert_same(pair)
        assert not torch.allclose(maps(other)["p2"], before["p2"])


def names_called(model, register):
    called = []
    handles = []
    for name, module in model.named_modules():
        if "backward" in register and "bottom_up" in name:
            continue  # Detectron2's blocks rectify in place, which such a hook forbids there too
        handles.append(getattr(module, register)(lambda *args, name=name: called.append(name) and None))
    with torch.set_grad_enabled("backward" in register):
        out = model.backbone(images().requires_grad_("backward" in register))
        if "backward" in register:
            sum(value.sum() for value in out.values()).backward()
    for handle in handles:
        handle.remove()
    return sorted(called)


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_on_every_module_fire(pair, register):
    exact, fast = (names_called(model.eval(), register) for model in pair)
    assert fast == exact and len(exact) > (4 if "backward" in register else 100)


@pytest.mark.parametrize("name", ["backbone.bottom_up.stem.conv1", "backbone.bottom_up.res3.0.conv2"])
@pytest.mark.parametrize("part", ["", ".norm"])
@torch.no_grad()
def test_hooks_that_change_the_output(pair, name, part):
    def double(model):
        model.get_submodule(name + part).register_forward_hook(lambda module, args, output: output * 2)

    assert assert_same(pair, double) > 1e-3


@torch.no_grad()
def test_hooks_on_laterals_keep_what_they_saw(pair):
    for lateral in ("fpn_lateral2", "fpn_lateral2.norm"):
        model = copy.deepcopy(pair[1])
        if lateral.endswith("norm"):
            model.backbone.fpn_lateral2.norm = nn.Identity()
        seen = []
        model.backbone.get_submodule(lateral).register_forward_hook(
            lambda module, args, out, seen=seen: seen.append((out, out.clone()))
        )
        maps(model)
        assert torch.equal(*seen[0])


@torch.no_grad()
def test_a_hook_on_all_modules(pair):
    counts = []
    for model in pair:
        called = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out, called=called: called.append(type(module).__name__)
        )
        try:
            maps(model)
        finally:
            handle.remove()
        counts.append(len(called))
    assert counts[0] == counts[1] > 100


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, base.stride, base.padding, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)
        nn.init.constant_(self.down.weight, 0.01)
        nn.init.constant_(self.up.weight, 0.1)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


REPLACED = ["backbone.bottom_up.res2.0.conv1", "backbone.bottom_up.res3.0.conv3", "backbone.fpn_output3"]


@pytest.mark.parametrize("name", REPLACED)
@torch.no_grad()
def test_a_convolution_wrapped_by_another_module(pair, name):
    def wrap(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRA(model.get_submodule(name)))

    assert assert_same(pair, wrap) > 1e-4


@torch.no_grad()
def test_a_lateral_replaced_by_what_passes_maps_on(pair):
    """The FPN must not write into the bottom-up map."""

    def replace(model):
        model.backbone.fpn_lateral2 = nn.Sequential(nn.Identity())
        model.backbone.fpn_lateral2.kept = []
        model.backbone.fpn_lateral2.register_forward_hook(lambda module, args, out: module.kept.append(out))

    for model in pair:
        model.backbone.fpn_output2 = Conv2d(64, 8, 3, padding=1)
        for level in (3, 4, 5):
            model.backbone.get_submodule(f"fpn_lateral{level}").weight.zero_()
            model.backbone.get_submodule(f"fpn_lateral{level}").bias.zero_()
    for name in ("weight", "bias"):
        getattr(pair[1].backbone.fpn_output2, name).copy_(getattr(pair[0].backbone.fpn_output2, name))
    # 64 channels and 32 do not add up: what matters is that nothing is written before that is found out.
    for model in pair:
        replace(model)
        with pytest.raises(RuntimeError):
            maps(model)


def instance_forward(model):
    conv = model.backbone.bottom_up.res2[0].conv2
    plain = type(conv).forward
    conv.forward = lambda x: plain(conv, x) * 3


CHANGES = {
    "weight_norm": lambda model: parametrizations.weight_norm(model.backbone.bottom_up.res2[0].conv2),
    "spectral_norm": lambda model: parametrizations.spectral_norm(model.backbone.bottom_up.res2[0].conv2).eval(),
    "old weight_norm": lambda model: nn.utils.weight_norm(model.backbone.bottom_up.res2[0].conv2),
    "pruning": lambda model: prune.l1_unstructured(model.backbone.fpn_output2, "weight", 0.5),
    "forward of one module": instance_forward,
    "norm": lambda model: setattr(model.backbone.bottom_up.res2[0].conv2, "norm", nn.BatchNorm2d(16).eval()),
    "activation": lambda model: setattr(model.backbone.fpn_output2, "activation", torch.sigmoid),
    "padding_mode": lambda model: setattr(model.backbone.fpn_output2, "padding_mode", "zeros"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_convolutions_that_were_changed(pair, change):
    def do(model):
        seed_everything()
        CHANGES[change](model)

    assert_same(pair, do)
    assert_same(pair, halve)


@torch.no_grad()
def test_a_method_patched_on_detectron2s_class(pair, monkeypatch):
    forward = Conv2d.forward
    with monkeypatch.context() as patch:
        patch.setattr(Conv2d, "forward", lambda self, x: forward(self, x) + 1)
        assert_same(pair)
    assert_same(pair)


def test_a_parametrisation_that_is_copied(pair):
    parametrizations.weight_norm(pair[1].backbone.fpn_output2)
    other = copy.deepcopy(pair[1])
    assert parametrize.is_parametrized(other.backbone.fpn_output2)
    torch.testing.assert_close(maps(other)["p2"], maps(pair[1])["p2"])


def test_views_of_parameters_and_gradients(pair):
    model = pair[1]
    sum(value.mean() for value in maps(model).values()).backward()
    torch.nn.utils.parameters_to_vector(model.parameters())
    for parameter in model.backbone.parameters():
        parameter.view(-1), parameter.grad.view(-1)


def test_lbfgs(pair):
    model = pair[1]
    optimizer = torch.optim.LBFGS(model.backbone.parameters(), max_iter=1)

    def closure():
        optimizer.zero_grad()
        loss = sum(value.square().mean() for value in maps(model).values())
        loss.backward()
        return loss

    optimizer.step(closure)


def test_quantize_dynamic(pair):
    quantized = [torch.ao.quantization.quantize_dynamic(model.roi_heads, {nn.Linear}) for model in pair]
    for model in quantized:
        assert any(isinstance(module, torch.ao.nn.quantized.dynamic.Linear) for module in model.modules())
    x = torch.randn(4, 32, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(quantized[1].box_head(x), quantized[0].box_head(x), rtol=1e-3, atol=1e-3)


def test_functional_call_and_vmap(pair):
    exact, fast = (model.eval() for model in pair)
    weights = {name: value * 0.5 for name, value in fast.backbone.named_parameters()}
    with torch.no_grad():
        expected = torch.func.functional_call(exact.backbone, weights, (images(),))
        found = torch.func.functional_call(fast.backbone, weights, (images(),))
        torch.testing.assert_close(found["p3"], expected["p3"], rtol=1e-4, atol=1e-5)
        one = fast.backbone.fpn_output3
        stack = torch.randn(2, 1, 32, 12, 16)
        torch.testing.assert_close(torch.func.vmap(one)(stack), torch.stack([one(x) for x in stack]))


def test_second_derivatives(pair):
    found = []
    for model in pair:
        x = images().requires_grad_()
        first = torch.autograd.grad(maps(model, x)["p3"].square().mean(), x, create_graph=True)[0]
        penalty = first.square().sum() * 1e3
        found.append((first.detach(), torch.autograd.grad(penalty, model.backbone.fpn_output3.weight)[0]))
    for actual, expected in zip(found[1], found[0], strict=True):
        # Where a ReLU is about to switch, rounding decides on single values.
        assert (actual - expected).norm() < 0.02 * expected.norm() != 0


class Tagged(torch.Tensor):
    pass


@torch.no_grad()
def test_subclasses_of_tensor_stay_so(pair):
    exact, fast = pair
    out = maps(fast, images().as_subclass(Tagged))
    assert type(out["p3"]) is type(maps(exact, images().as_subclass(Tagged))["p3"]) is Tagged
    torch.testing.assert_close(out["p3"].as_subclass(torch.Tensor), maps(exact)["p3"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["autocast", "bfloat16", "float16"])
@torch.no_grad()
def test_lower_precision(pair, kind):
    found = []
    for model in pair:
        if kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                found.append(maps(model)["p3"])
        else:
            dtype = getattr(torch, kind)
            found.append(maps(model.to(dtype), images().to(dtype))["p3"])
    assert found[0].dtype == found[1].dtype
    scale = float(found[0].float().abs().max())
    torch.testing.assert_close(found[1].float(), found[0].float(), rtol=0, atol=0.05 * scale)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_tracing_and_counting(pair):
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in pair:
        with FlopCounterMode(display=False) as counter:
            model.eval()([{"image": torch.zeros(3, *SIZE)}])
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    traced = torch.jit.trace(pair[1].eval().backbone.bottom_up.res2, torch.randn(1, 16, 24, 32))
    x = torch.randn(1, 16, 40, 36)
    torch.testing.assert_close(traced(x), pair[0].eval().backbone.bottom_up.res2(x), rtol=1e-4, atol=1e-4)


def test_of_another_device():
    """Built for one device and moved to another: the choice is made in each call."""
    model = detector("fast")[1]
    assert maps(model.to("meta"), images().to("meta"))["p3"].is_contiguous()


def fields(instances):
    return [(one.proposal_boxes.tensor, one.objectness_logits) for one in instances]


def train(model, cfg):
    seed_everything()
    return {name: loss.detach() for name, loss in model.train()(random_batch(cfg)).items()}


class Picky(Matcher):
    def __call__(self, overlaps):
        matches, labels = super().__call__(overlaps)
        return matches, labels.clamp(max=0)


OVERRIDES = {
    "Matcher of one's own": lambda model: setattr(
        model.proposal_generator, "anchor_matcher", Picky([0.3, 0.7], [0, -1, 1])
    ),
    "Matcher patched": (Matcher, "__call__", lambda f: lambda self, q: (f(self, q)[0], f(self, q)[1].clamp(max=0))),
    "sampling of anchors": (RPN, "_subsample_labels", lambda f: lambda self, labels: f(self, labels.clamp(max=0))),
    "sampling of proposals": (ROIHeads, "_sample_proposals", lambda f: lambda self, *a: [x[:5] for x in f(self, *a)]),
    "selection of proposals": (
        RPN,
        "predict_proposals",
        lambda f: lambda self, *args: [image[:3] for image in f(self, *args)],
    ),
    "decoding": (RPN, "_decode_proposals", lambda f: lambda self, *a: [boxes * 0.5 for boxes in f(self, *a)]),
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_what_people_override_in_training(override, monkeypatch):
    change = OVERRIDES[override]
    (cfg, exact), (_, fast) = detector("exact"), detector("fast")
    before = train(fast, cfg)
    if isinstance(change, tuple):
        kind, name, wrap = change
        monkeypatch.setattr(kind, name, wrap(getattr(kind, name)))
    else:
        change(exact), change(fast)
    expected, actual = train(exact, cfg), train(fast, cfg)
    for name, loss in expected.items():
        torch.testing.assert_close(actual[name], loss, rtol=1e-3, atol=1e-4)
    assert any(abs(float(before[name] - loss)) > 1e-3 * abs(float(loss)) for name, loss in expected.items())


def test_a_subclass_of_ones_own_is_fast_and_keeps_its_say():
    class Mine(Conv2d):
        def forward(self, x):
            return super().forward(x) + 1

    class Plain(Conv2d):
        pass

    net = make_fast(nn.Sequential(Mine(16, 16, 3, padding=1), Plain(16, 16, 3, padding=1)))
    assert [isinstance(module, Fast) for module in net] == [False, True] and isinstance(net[1], Plain)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_scripting_with_instances(numerics):
    from detectron2.export import scripting_with_instances

    cfg, model = detector(numerics)
    fields = {
        "proposal_boxes": Boxes, "objectness_logits": torch.Tensor, "pred_boxes": Boxes, "scores": torch.Tensor,
        "pred_classes": torch.Tensor,
    }  # fmt: skip
    model.eval().roi_heads.box_predictor.test_score_thresh = 0.0
    batch = [{"image": images()[0] * 57 + 100}]
    with torch.no_grad():
        expected = model.inference(batch, do_postprocess=False)[0]
        scripted = scripting_with_instances(copy.deepcopy(model), fields)
        found = scripted.inference(batch, None, do_postprocess=False)[0]
    assert len(found.scores) == len(expected) > 10
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.pred_boxes.tensor[:5], expected.pred_boxes.tensor[:5], rtol=1e-3, atol=0.05)
