"""timm models as bottom-up pathways: maps, layouts, weights, preprocessing, freezing, norms, checkpointing."""

import http.server
import math
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY
from torch import nn

from fpn_d2 import add_fpn_d2_config
from fpn_d2.errors import UserError
from fpn_d2.modeling import TimmBackbone, expected_preprocessing
from fpn_d2.modeling.bottom_up import timm_backbone, timm_download
from fpn_d2.modeling.bottom_up.names import find_bottom_up

timm = pytest.importorskip("timm")

SMALL_SWIN = {"depths": [1, 1, 2, 1], "embed_dim": 24, "num_heads": [1, 2, 3, 6]}
# Name: options that make it small, and whether images are padded inside.
FAMILIES = {
    "resnet18": ({}, 1),
    "efficientnet_lite0": ({}, 1),
    "convnext_atto": ({"depths": [1, 1, 2, 1], "dims": [8, 16, 32, 64]}, 32),
    "swin_tiny_patch4_window7_224": (SMALL_SWIN, 32),
    "swinv2_tiny_window8_256": (SMALL_SWIN, 32),
    "mvitv2_tiny": ({}, 1),
    "hrnet_w18_small": ({}, 32),
    "mobilenetv4_conv_small": ({}, 1),
    "regnetx_002": ({}, 1),
}


def build(name="resnet18", **options):
    torch.manual_seed(0)
    return TimmBackbone(name, **({"options": FAMILIES[name][0]} | options))


def config(*options):
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    cfg.MODEL.TIMM.NAME = "resnet18"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.merge_from_list(list(options))
    return cfg


def from_config(*options):
    return BACKBONE_REGISTRY.get("fpn_d2.build_timm_backbone")(config(*options), ShapeSpec(channels=3))


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    """Declared shapes are real at odd sizes, and the maps are timm's own where timm makes them without padding."""
    backbone = build(name).eval()
    assert backbone.size_divisibility == (FAMILIES[name][1] if FAMILIES[name][1] > 1 else 0)
    assert list(backbone.output_shape()) == ["res2", "res3", "res4", "res5"]
    assert [shape.stride for shape in backbone.output_shape().values()] == [4, 8, 16, 32]
    for size in [(75, 101), (33, 62)]:
        with torch.no_grad():
            maps = backbone(torch.randn(1, 3, *size))
        assert list(maps) == list(backbone.output_shape())
        for key, shape in backbone.output_shape().items():
            assert maps[key].shape == (1, shape.channels, *(math.ceil(side / shape.stride) for side in size))

    torch.manual_seed(0)
    extra = {"strict_img_size": False} if "swin" in name else {}
    theirs = timm.create_model(name, features_only=True, **FAMILIES[name][0], **extra).eval()
    theirs.load_state_dict(backbone.body.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, maps = theirs(images)[-4:], backbone(images)
    for value, own in zip(expected, maps.values(), strict=True):
        value = value.movedim(-1, 1) if "swin" in name else value
        torch.testing.assert_close(own, value, rtol=1e-4, atol=1e-5)
        assert own.std() > 0


def test_same_seed_gives_timms_own_initial_weights():
    torch.manual_seed(3)
    theirs = timm.create_model("resnet18", features_only=True, out_indices=(2, 3))
    torch.manual_seed(3)
    ours = TimmBackbone("resnet18", out_features=["res4", "res3"])
    assert list(ours.output_shape()) == ["res3", "res4"]
    assert list(theirs.state_dict()) == list(ours.body.state_dict())  # layer4 is not even built
    for a, b in zip(theirs.state_dict().values(), ours.body.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_padding_is_zeros_at_the_bottom_and_the_right():
    backbone = build("convnext_atto").eval()
    image = torch.randn(1, 3, 75, 101)
    padded = torch.zeros(1, 3, 96, 128)
    padded[..., :75, :101] = image
    with torch.no_grad():
        for value, full in zip(backbone(image).values(), backbone(padded).values(), strict=True):
            assert torch.equal(value, full[..., : value.shape[2], : value.shape[3]])


@pytest.mark.parametrize("channels,stride", [([4, 8], [4, 8]), ([4, 6], [4, 16])])
def test_what_the_model_declares_is_checked(monkeypatch, channels, stride):
    class Body(nn.Module):
        feature_info = SimpleNamespace(channels=lambda: channels, reduction=lambda: stride, out_indices=(0, 1))

        def forward(self, x):
            x = nn.functional.max_pool2d(x[:, [0, 1, 2, 0]], 4, ceil_mode=True)
            return [x, nn.functional.max_pool2d(x[:, [0, 1, 2, 0, 1, 2]], 2, ceil_mode=True)]

    monkeypatch.setattr(timm_backbone, "create_model", lambda *_, **__: Body())
    with pytest.raises(UserError, match="cannot be used at any size of image.*where .* was declared"):
        TimmBackbone("resnet18", out_features=["res2", "res3"])


@pytest.mark.parametrize(
    "name,options,message",
    [
        ("resnet81", {}, "'resnet81'.*did you mean .*resnet"),
        ("?", {}, r"timm.list_models\(\)"),
        ("resnet18.imagenet", {}, "resnet18 has the weights .*a1_in1k"),
        (
            "vit_tiny_patch16_224",
            {"options": {"depth": 3}},
            r"asks for res2, .*gives res4 \(stride 16, 192 .*build_vit",
        ),
        ("resnet18", {"out_features": ["res6"]}, r"asks for res6; .*res1 \(stride 2, 64 channels\), res2 \(stride 4"),
        ("resnet18", {"out_features": []}, "asks for nothing"),
        ("resnet18", {"norm": "GN"}, "'GN'; expected"),
        ("resnet18", {"options": {"depht": 3}}, "cannot make resnet18 with depht=3.*OPTIONS"),
        ("resnet18", {"freeze_at": -1}, "FREEZE_AT.*-1"),
        ("mixer_s32_224", {}, "mixer_s32_224 cannot be used at any size of image.*declares strides"),
        ("convnext_atto", {"norm": "FrozenBN"}, "has no batch norm"),
        ("hrnet_w18_small", {"freeze_at": 2}, "parallel branches"),
        ("hrnet_w18_small", {"gradient_checkpointing": True}, "GRADIENT_CHECKPOINTING"),
        ("resnet18", {"weights": "/nowhere.pth"}, "no such file"),
        ("resnet18", {"weights": "/nowhere.pth", "pretrained": True}, "set only one"),
    ],
)
def test_construction_refuses(name, options, message):
    with pytest.raises(UserError, match=message):
        TimmBackbone(name, **options)


def test_builder_reads_every_key():
    backbone = from_config(
        *["MODEL.TIMM.OUT_FEATURES", ["res3", "res5"], "MODEL.TIMM.NORM", "FrozenBN", "MODEL.TIMM.DROP_PATH", 0.2],
        *["MODEL.TIMM.OPTIONS", [["stem_width", 16], ["stem_type", "deep"]], "MODEL.BACKBONE.FREEZE_AT", 2],
        *["MODEL.BACKBONE.GRADIENT_CHECKPOINTING", True],
    )
    assert list(backbone.output_shape()) == ["res3", "res5"]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    rates = [m.drop_prob for m in backbone.modules() if hasattr(m, "drop_prob")]
    assert max(rates) == pytest.approx(0.2)
    assert backbone.body.conv1[0].out_channels == 16
    assert not backbone.body.layer1[0].conv1.weight.requires_grad and backbone.body.layer2[0].conv1.weight.requires_grad
    assert backbone.body.grad_checkpointing
    with pytest.raises(UserError, match="set MODEL.TIMM.NAME"):
        from_config("MODEL.TIMM.NAME", "")
    with pytest.raises(UserError, match=r"MODEL.TIMM.OPTIONS is \['stem_width'\]; expected pairs"):
        from_config("MODEL.TIMM.OPTIONS", ["stem_width"])


# ---- Weights and preprocessing ----------------------------------------------------------------------------------


def save(folder, kind, change=None, classes=1000):
    torch.manual_seed(1)
    state = timm.create_model("mobilenetv4_conv_small", num_classes=classes).state_dict()
    if change:
        change(state)
    path = folder / f"weights.{kind}"
    if kind == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save({"state_dict": state}, path)
    return str(path), state


@pytest.mark.parametrize("kind,classes", [("safetensors", 1000), ("pth", 7), ("pth", 0)])
def test_weights_file_is_loaded_whatever_its_classes(tmp_path, kind, classes, caplog):
    path, state = save(tmp_path, kind, classes=classes)
    loaded = build("mobilenetv4_conv_small", weights=path).body.state_dict()
    assert len(loaded) > 100
    for key, value in loaded.items():
        assert torch.equal(value, state[key.replace("blocks_", "blocks.")]), key
    assert "Unexpected keys" not in caplog.text  # of the layers behind the last map


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda state: state.pop("conv_stem.weight"), "does not fit timm's mobilenetv4_conv_small.*conv_stem.weight"),
        (lambda state: state.update(extra=torch.zeros(1)), "Unexpected.*extra"),
        (lambda state: state.update({"bn1.bias": torch.zeros(5)}), "size mismatch for bn1.bias"),
    ],
)
def test_weights_file_that_does_not_match_is_refused(tmp_path, change, message):
    path, _ = save(tmp_path, "pth", change)
    with pytest.raises(UserError, match=f"(?s)MODEL.TIMM.WEIGHTS.*{message}"):
        build("mobilenetv4_conv_small", weights=path)


def test_a_file_that_holds_no_weights_is_told(tmp_path):
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(UserError, match="MODEL.TIMM.WEIGHTS .*junk.pth cannot be read as weights"):
        build(weights=str(tmp_path / "junk.pth"))


def test_checkpointing_that_loses_gradients_is_refused(monkeypatch):
    monkeypatch.setattr(timm.layers, "use_reentrant_ckpt", lambda: True)
    with pytest.raises(UserError, match="GRADIENT_CHECKPOINTING needs a timm that .*install a newer one"):
        build(gradient_checkpointing=True)


def test_preprocessing_of_weights_is_insisted_on(tmp_path):
    path, _ = save(tmp_path, "pth")
    keys = ["MODEL.TIMM.NAME", "mobilenetv4_conv_small", "MODEL.TIMM.WEIGHTS", path]
    with pytest.raises(UserError, match="expect other images") as refusal:
        from_config(*keys)
    lines = [line.split(": ") for line in str(refusal.value).splitlines() if ": " in line]
    assert [key for key, _ in lines] == ["INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"]
    right = [word for key, value in lines for word in (key, eval(value))]
    assert from_config(*keys, *right).output_shape()
    for i, wrong in ((1, "BGR"), (3, [123.675, 116.28, 100.0]), (5, [1.0, 1.0, 1.0])):
        with pytest.raises(UserError, match="expect other images"):
            from_config(*keys, *right[:i], wrong, *right[i + 1 :])
    assert from_config(*keys, "MODEL.TIMM.PREPROCESSING", "ignore").output_shape()
    with pytest.raises(UserError, match="PREPROCESSING is 'skip'"):
        from_config(*keys, "MODEL.TIMM.PREPROCESSING", "skip")
    assert from_config().output_shape()  # without weights any images will do


def test_expected_preprocessing_is_in_units_of_255():
    assert expected_preprocessing("resnet18") == ("RGB", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    assert expected_preprocessing("vit_tiny_patch16_224.augreg_in21k")[1:] == ([127.5] * 3, [127.5] * 3)


def test_pretrained_asks_timm_for_its_weights(monkeypatch):
    asked = []
    monkeypatch.setattr(timm_download, "_unreachable", lambda address: "")
    monkeypatch.setattr(timm.models._builder, "load_pretrained", lambda model, **_: asked.append(type(model).__name__))
    build("resnet18", pretrained=True)
    assert asked == ["ResNet"]


def test_weights_that_cannot_be_downloaded_are_one_sentence_without_a_try_of_timms(monkeypatch):
    asked = []
    monkeypatch.setattr(timm.models._builder, "load_pretrained", lambda *_, **__: asked.append("tried"))
    monkeypatch.setattr(timm_download, "_unreachable", lambda address: f"no way to {address}")
    told = r"TIMM.PRETRAINED is True, but timm cannot download the weights of resnet18 .*no way to https?://\S+\): .*"
    with pytest.raises(UserError, match=told + "MODEL.TIMM.WEIGHTS and set MODEL.TIMM.PRETRAINED to False"):
        build("resnet18", pretrained=True)
    assert asked == []


def test_a_download_that_breaks_off_is_one_sentence(monkeypatch):
    def broken(*_, **__):
        raise ConnectionError("the line is\ncut")

    monkeypatch.setattr(timm_download, "_unreachable", lambda address: "")
    monkeypatch.setattr(timm.models._builder, "load_pretrained", broken)
    with pytest.raises(UserError, match=r"weights of resnet18 \(the line is cut\): .*MODEL.TIMM.WEIGHTS"):
        build("resnet18", pretrained=True)


def test_what_was_downloaded_before_needs_no_network(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    weights = timm.create_model("resnet18", num_classes=1000).state_dict()
    torch.save(weights, tmp_path / "pytorch_model.bin")

    def cached(repository, name, revision):
        assert repository.startswith("timm/resnet18")
        return str(tmp_path / name) if (tmp_path / name).exists() else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    monkeypatch.setattr(timm_download, "_unreachable", lambda address: "no network")
    built = build("resnet18", pretrained=True).state_dict()
    torch.testing.assert_close(built["body.layer1.0.conv1.weight"], weights["layer1.0.conv1.weight"])


def test_what_torchvision_has_downloaded_is_found(monkeypatch, tmp_path):
    """For weights of torchvision, timm names the same files, and both keep them in the same folder."""
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(timm_download, "_unreachable", lambda address: "no network")
    file = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    with pytest.raises(UserError, match=rf"bring https://\S+ to {tmp_path}/checkpoints/{file}\)$"):
        TimmBackbone("resnet18.tv_in1k", pretrained=True)
    (tmp_path / "checkpoints").mkdir()
    weights = torchvision.models.resnet18().state_dict()
    torch.save(weights, tmp_path / "checkpoints" / file)
    built = TimmBackbone("resnet18.tv_in1k", pretrained=True).state_dict()
    assert torch.equal(built["body.layer4.1.conv2.weight"], weights["layer4.1.conv2.weight"])
    with pytest.raises(UserError, match=r"on this machine already, for MODEL.TIMM.NAME: resnet18.tv_in1k$"):
        build("resnet18", pretrained=True)


def test_any_answer_of_a_server_will_do_and_none_is_told():
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(403)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        address = f"http://127.0.0.1:{server.server_port}/weights"
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert timm_download._unreachable(address) == ""
    assert "refused" in timm_download._unreachable(address)
    assert timm_download._unreachable("file:///weights") == ""


# ---- Freezing, norms, checkpointing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,stem,stage",
    [
        ("resnet18", ("conv1", "bn1"), ("layer1",)),
        ("mobilenetv4_conv_small", ("conv_stem", "bn1"), ("blocks_0", "blocks.0")),
        ("convnext_atto", ("stem_",), ("stages_0",)),
        ("swin_tiny_patch4_window7_224", ("patch_embed",), ("layers_0",)),
        ("mvitv2_tiny", ("model.patch_embed",), ("model.stages.0",)),
    ],
)
def test_freezing_counts_stages_as_detectron2_does(name, stem, stage):
    for freeze_at, frozen in ((0, ()), (1, stem), (2, stem + stage)):
        backbone = build(name, freeze_at=freeze_at)
        own = dict(backbone.body.named_parameters())
        assert {key for key, p in own.items() if not p.requires_grad} == {key for key in own if key.startswith(frozen)}
        norms = [key for key, m in backbone.body.named_modules() if isinstance(m, nn.BatchNorm2d)]
        assert not [key for key in norms if key.startswith(frozen)]


def test_frozen_stages_do_not_move_and_others_do():
    backbone = build("mobilenetv4_conv_small", freeze_at=3).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    images = torch.randn(2, 3, 64, 64)
    sum(value.square().mean() for value in backbone(images).values()).backward()
    torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1).step()
    moved = {key.split(".")[2] for key, value in backbone.state_dict().items() if not torch.equal(before[key], value)}
    parts = {key.split(".")[1] for key in before}
    frozen = {"conv_stem", "bn1", "blocks"}
    assert parts <= frozen and moved == {"2", "3", "4"}


def randomise_statistics(module):
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)


def test_frozen_norms_are_the_norms_in_evaluation_mode(tmp_path):
    """With the activation that timm puts into some of its norms, and with the statistics of the weights."""
    model = timm.create_model("mobilenetv4_conv_small")
    randomise_statistics(model)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    plain, frozen = (
        build("mobilenetv4_conv_small", weights=str(tmp_path / "weights.pth"), norm=norm) for norm in ("", "FrozenBN")
    )
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        expected, actual = plain.double().eval()(images), frozen.double().train()(images)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value)


def test_synchronised_norms():
    kinds = {type(m) for m in build("efficientnet_lite0", norm="SyncBN", freeze_at=1).modules()}
    assert any(issubclass(kind, nn.SyncBatchNorm) for kind in kinds)
    assert not any(issubclass(kind, nn.BatchNorm2d) for kind in kinds)


def test_statistics_of_frozen_stages_stay_under_synchronised_norms():
    norms = {name for name, module in build("resnet18").named_modules() if isinstance(module, nn.BatchNorm2d)}
    for freeze_at, parts in ((1, ("body.bn1",)), (2, ("body.bn1", "body.layer1."))):
        backbone = build("resnet18", norm="SyncBN", freeze_at=freeze_at)
        modules = dict(backbone.named_modules())
        frozen = {name for name in norms if not isinstance(modules[name], nn.SyncBatchNorm)}
        assert frozen == {name for name in norms if name.startswith(parts)}
        assert not any(list(modules[name].parameters()) for name in frozen)


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "mvitv2_tiny"])
def test_checkpointing_recomputes_and_gives_the_same_gradients(name):
    images = torch.randn(1, 3, 64, 64)
    gradients, calls = [], []
    for checkpointing in (False, True):
        backbone = build(name, gradient_checkpointing=checkpointing, freeze_at=2)
        count = []
        for module in backbone.modules():
            module.register_forward_hook(lambda *_: count.append(1))  # noqa: B023
        sum(value.square().mean() for value in backbone(images).values()).backward()
        gradients.append({key: p.grad for key, p in backbone.named_parameters() if p.requires_grad})
        calls.append(len(count))
    assert calls[1] > calls[0]
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-4, atol=1e-6)


# ---- Without timm -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", ["build_timm_backbone", "build_vit_backbone", "build_hybrid_resnet_vit_backbone"])
def test_without_timm_one_sentence_says_what_to_install(monkeypatch, builder):
    monkeypatch.setitem(sys.modules, "timm", None)
    cfg = config("MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"])
    with pytest.raises(UserError, match="needs timm, which is not installed: pip install timm$"):
        find_bottom_up(builder)(cfg, ShapeSpec(channels=3))


def test_import_of_fpn_d2_does_not_import_timm():
    code = "import sys; sys.modules['timm'] = None; import fpn_d2; from fpn_d2.modeling import TimmBackbone"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
