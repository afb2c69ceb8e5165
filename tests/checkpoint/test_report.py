"""How much of a model a file filled, and whether that will do."""

import pickle

import pytest
import torch
from detectron2.modeling import build_model

from fpn_d2.checkpoint.report import part_of
from fpn_d2.engine import ReportingCheckpointer, UserError
from tests.engine.small import small_config


@pytest.fixture(scope="module")
def cfg(tmp_path_factory, scenes):
    return small_config(tmp_path_factory.mktemp("weights"), scenes)


@pytest.fixture(scope="module")
def weights(cfg):
    """A state dict of the small detector, all of it ones."""
    return {name: torch.ones_like(value) for name, value in build_model(cfg).state_dict().items()}


def _load(cfg, path, weights, **how):
    """Load a file with ``weights`` into a fresh model; return the model's state."""
    torch.save({"model": weights}, path)
    model = build_model(cfg)
    ReportingCheckpointer(model, **how).load(str(path))
    return model.state_dict()


def _part(weights, name):
    return {k: v for k, v in weights.items() if part_of(k) == name}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("backbone.bottom_up.stem.conv1.weight", "bottom_up"),
        ("backbone.fpn_lateral3.weight", "neck"),
        ("backbone.top_block.p6.weight", "neck"),
        ("backbone.stem.conv1.weight", "backbone"),
        ("proposal_generator.rpn_head.conv.weight", "rpn"),
        ("roi_heads.box_predictor.0.cls_score.weight", "box_predictor"),
        ("head.cls_score.weight", "head"),
        ("sem_seg_head.predictor.weight", "sem_seg_head"),
    ],
)
def test_part_of(name, part):
    assert part_of(name) == part


@pytest.mark.parametrize("policy", ["auto", "allow", "refuse"])
def test_a_whole_file_is_taken_and_counted_by_part(tmp_path, cfg, weights, caplog, policy):
    caplog.set_level("INFO")
    state = _load(cfg, tmp_path / "w.pth", weights, partial_weights=policy, whole=True)
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    assert f"Loaded {len(weights)} of {len(weights)} tensors" in caplog.text
    for part in ("bottom_up", "neck", "rpn", "box_head", "box_predictor"):
        count = len(_part(weights, part))
        assert count > 0
        assert f"{part} {count}/{count}" in caplog.text


def test_a_bottom_up_pathway_alone_is_taken_and_the_gaps_are_named(tmp_path, cfg, weights, caplog):
    state = _load(cfg, tmp_path / "w.pth", _part(weights, "bottom_up"))
    assert torch.equal(state["backbone.bottom_up.stem.conv1.weight"], weights["backbone.bottom_up.stem.conv1.weight"])
    assert "box_head: 2 tensors are not in the file" in caplog.text


def test_other_numbers_of_classes_are_taken_and_named(tmp_path, cfg, weights, caplog):
    classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    old = dict(weights)
    for name, rows in (("cls_score", 81), ("bbox_pred", 320)):
        for kind in ("weight", "bias"):
            key = f"roi_heads.box_predictor.{name}.{kind}"
            old[key] = torch.ones(rows, *weights[key].shape[1:])
    state = _load(cfg, tmp_path / "w.pth", old)
    assert state["roi_heads.box_predictor.cls_score.bias"].shape == (classes + 1,)
    assert torch.equal(state["roi_heads.box_head.fc1.weight"], weights["roi_heads.box_head.fc1.weight"])
    assert "cls_score.bias is (81,) in the file" in caplog.text


def _without(weights, *names):
    return {k: v for k, v in weights.items() if k not in names}


LATERAL = "backbone.fpn_lateral3.weight"
MISFITS = {
    "part of a part": lambda w: _without(w, LATERAL),
    "another width": lambda w: {**w, LATERAL: torch.ones(8, 128, 1, 1)},
    "another number of anchors": lambda w: {
        **w, "proposal_generator.rpn_head.objectness_logits.weight": torch.ones(9, 16, 1, 1)
    },
    "another width of the box head": lambda w: {
        **w, "roi_heads.box_predictor.cls_score.weight": torch.ones(9, 8)
    },
    "a deeper bottom-up": lambda w: {**w, "backbone.bottom_up.res4.2.conv1.weight": torch.ones(1)},
    "another box head": lambda w: {
        **_without(w, "roi_heads.box_head.fc1.weight", "roi_heads.box_head.fc1.bias"),
        "roi_heads.box_head.conv1.weight": torch.ones(1),
    },
    "nothing in common": lambda w: {"a": torch.ones(1)},
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_mismatch_within_a_part_is_refused_unless_allowed(tmp_path, cfg, weights, misfit):
    other = MISFITS[misfit](weights)
    for policy in ("auto", "refuse"):
        with pytest.raises(UserError, match="w.pth: .*PARTIAL_WEIGHTS allow"):
            _load(cfg, tmp_path / "w.pth", other, partial_weights=policy)
    _load(cfg, tmp_path / "w.pth", other, partial_weights="allow")


@pytest.mark.parametrize("extra", ["roi_heads.mask_head.predictor.weight", "backbone.bottom_up.fc.weight"])
def test_whole_parts_and_classifiers_that_the_model_lacks_do_no_harm(tmp_path, cfg, weights, extra, caplog):
    more = {**weights, extra: torch.ones(1)}
    _load(cfg, tmp_path / "w.pth", more, whole=True)
    assert f"1 tensors of the file are not used: {extra}" in caplog.text
    with pytest.raises(UserError, match="1 tensors more than the model"):
        _load(cfg, tmp_path / "w.pth", more, partial_weights="refuse")


def test_an_evaluation_needs_the_whole_model(tmp_path, cfg, weights):
    part = _part(weights, "bottom_up")
    with pytest.raises(UserError, match=f"only {len(part)} of {len(weights)} tensors"):
        _load(cfg, tmp_path / "w.pth", part, whole=True)
    _load(cfg, tmp_path / "w.pth", part, whole=True, partial_weights="allow")
    with pytest.raises(UserError, match="no weights to evaluate"):
        ReportingCheckpointer(build_model(cfg), whole=True).load("")


@pytest.mark.parametrize("author", [None, "Caffe2"])
def test_names_of_imagenet_files_are_matched_and_counted(tmp_path, cfg, weights, caplog, author):
    """Files trained on ImageNet name their tensors from the bottom-up pathway on; those of Caffe2 in its own way."""
    caplog.set_level("INFO")
    prefix = "backbone.bottom_up."
    short = {k.removeprefix(prefix): v.numpy() for k, v in _part(weights, "bottom_up").items()}
    content = {"model": {**short, "fc1000.weight": short["stem.conv1.weight"]}, "matching_heuristics": True}
    content["__author__"] = "somebody"
    if author:
        caffe = {_caffe_name(k): v for k, v in short.items()}
        content = {**caffe, "fc1000_w": short["stem.conv1.weight"]}
    path = tmp_path / "imagenet.pkl"
    path.write_bytes(pickle.dumps(content))
    model = build_model(cfg)
    ReportingCheckpointer(model).load(str(path))
    state = model.state_dict()
    assert all(torch.equal(state[prefix + name], torch.from_numpy(value)) for name, value in short.items())
    assert f"bottom_up {len(short)}/{len(short)}" in caplog.text


def _caffe_name(name):
    """ "res2.0.conv1.norm.weight" -> "res2_0_branch2a_bn_gamma" """
    for ours, theirs in (
        ("stem.", ""), ("shortcut", "branch1"), ("conv1", "conv1"), ("norm.weight", "bn_gamma"),
        ("norm.bias", "bn_beta"), ("weight", "w"), ("bias", "b"),
    ):
        name = name.replace(ours, theirs)
    if name.startswith("res"):
        name = name.replace("conv1", "branch2a").replace("conv2", "branch2b")
    return name.replace(".", "_")


def test_a_deeper_imagenet_file_is_refused(tmp_path, cfg, weights):
    short = {k.removeprefix("backbone.bottom_up."): v.numpy() for k, v in _part(weights, "bottom_up").items()}
    short["res4.5.conv1.weight"] = short["res4.1.conv1.weight"]
    path = tmp_path / "imagenet.pkl"
    path.write_bytes(pickle.dumps({"model": short, "matching_heuristics": True, "__author__": "somebody"}))
    with pytest.raises(UserError, match=r"bottom_up has layers that the model lacks .*res4\.5\.conv1"):
        ReportingCheckpointer(build_model(cfg)).load(str(path))


def test_a_short_name_of_another_size_by_class_is_taken(tmp_path, cfg, weights, caplog):
    short = {k.removeprefix("roi_heads."): v.numpy() for k, v in weights.items()}
    short["box_predictor.cls_score.bias"] = torch.ones(81).numpy()
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps({"model": short, "matching_heuristics": True, "__author__": "somebody"}))
    ReportingCheckpointer(build_model(cfg)).load(str(path))
    assert "roi_heads.box_predictor.cls_score.bias is of another shape" in caplog.text
