"""Anchors that do not fit the levels, sizes that no image can have, schedules that end within the warm-up."""

import pytest

from fpn_d2.engine import Trainer, UserError, load_config
from fpn_d2.engine.numbers import missing_maps_are_told, short_schedule

from .small import small_config
from .test_checks import OURS

LEVELS = ["MODEL.RPN.IN_FEATURES", "['p2', 'p3', 'p4', 'p5', 'p6']"]
SIZES, RATIOS = "MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"
FIVE = [SIZES, "[[32], [64], [128], [256], [512]]"]


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        ([SIZES, "[[32], [64]]"], "SIZES has 2 lists for 5 levels p2 to p6: expected one for each level, or a single"),
        ([*FIVE, RATIOS, "[[1.0], [1.0], [2.0]]"], "ASPECT_RATIOS has 3 lists for 5 levels p2 to p6"),
        ([SIZES, "[32, 64, 128, 256, 512]"], r"one list \[32, 64, .* write \[\[32\], \[64\], .*\] for one size a"),
        ([SIZES, "[[32], [64], [128], [256], [-512]]"], r"SIZES has \[-512\] among its lists; expected .* greater"),
        ([SIZES, "[[]]"], r"SIZES has \[\] among its lists"),
        ([*FIVE, RATIOS, "[[0.5, 0.0]]"], r"ASPECT_RATIOS has \[0.5, 0.0\]"),
        ([SIZES, "[[32], [64], [128], [256], [512, 600]]"], r"make \[3, 3, 3, 3, 6\] anchors a cell"),
        (["INPUT.MIN_SIZE_TRAIN", "(0,)"], r"INPUT.MIN_SIZE_TRAIN is \[0\]; expected shorter sides of at least 1"),
        (["INPUT.MIN_SIZE_TRAIN", "()"], "INPUT.MIN_SIZE_TRAIN is"),
        (["INPUT.MIN_SIZE_TEST", "-1"], "INPUT.MIN_SIZE_TEST is -1"),
        (["INPUT.MIN_SIZE_TRAIN", "(640, 800)", "INPUT.MAX_SIZE_TRAIN", "700"], "TRAIN is 700, less than .*800"),
        (["INPUT.MAX_SIZE_TEST", "700"], "INPUT.MAX_SIZE_TEST is 700, less than INPUT.MIN_SIZE_TEST 800"),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"], "MIN_SIZE_TRAIN has 1 sizes; .*the least and the greatest"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(opts, words):
    with pytest.raises(UserError, match=words):
        load_config("", [*OURS, *LEVELS, *opts])


def test_retinanets_levels_are_its_own():
    opts = [*OURS, "MODEL.META_ARCHITECTURE", "FPNRetinaNet", SIZES, "[[32], [64]]"]
    with pytest.raises(UserError, match="2 lists for 5 levels p3 to p7"):
        load_config("", opts)


@pytest.mark.parametrize(
    "opts",
    [
        FIVE,
        [SIZES, "[[32, 64]]"],  # the same for all
        [*FIVE, RATIOS, "[0.5, 1.0, 2.0]"],  # as Detectron2 reads it, and as it is meant
        ["MODEL.RPN.IN_FEATURES", "['res4']", SIZES, "[32, 64]"],
        ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", SIZES, "[[32], [64]]"],  # not read
        ["INPUT.MIN_SIZE_TEST", "0"],
        ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", "(640, 800)"],
    ],
)
def test_numbers_that_fit_pass(opts):
    load_config("", [*OURS, *LEVELS, *opts])


@pytest.mark.parametrize("backbone", ["build_fpn_backbone", "build_resnet_fpn_backbone"])
@pytest.mark.parametrize("generator", ["RPN", "FPNRPN"])
def test_an_rpn_that_reads_a_level_that_is_not_there(tmp_path, scenes, backbone, generator):
    opts = ["MODEL.BACKBONE.NAME", backbone, "MODEL.PROPOSAL_GENERATOR.NAME", generator]
    read = "['p2', 'p3', 'p4', 'p5', 'p7']"
    cfg = small_config(tmp_path, scenes, *opts, "MODEL.RPN.IN_FEATURES", read)
    # Our own backbone knows whose maps it makes, and says which top block there is.
    words = "RPN asks for p7.*TOP_BLOCK" if backbone == "build_fpn_backbone" else "'p7'.*the backbone gives no p7: .*"
    with pytest.raises(UserError, match=words):
        Trainer.build_model(cfg)


def test_a_neck_without_a_top_block_under_a_retinanet(tmp_path, scenes):
    opts = ["MODEL.META_ARCHITECTURE", "FPNRetinaNet", "MODEL.FPN.TOP_BLOCK", "none"]
    cfg = small_config(tmp_path, scenes, *opts)
    with pytest.raises(UserError, match="the pyramid has p2, p3, p4, p5, not the .p6. that .*TOP_BLOCK to p6p7_p5"):
        Trainer.build_model(cfg)


def test_other_missing_keys_keep_their_traceback(tmp_path, scenes):
    with pytest.raises(KeyError), missing_maps_are_told(small_config(tmp_path, scenes)):
        {}["something else"]


@pytest.mark.parametrize(("warmup", "total", "told"), [(100, 60, True), (31, 60, True), (30, 60, False), (0, 1, False)])
def test_a_schedule_that_ends_within_its_warm_up_is_told_of(warmup, total, told):
    schedule = ["SOLVER.WARMUP_ITERS", str(warmup), "SOLVER.MAX_ITER", str(total)]
    words = short_schedule(load_config("", schedule))
    assert bool(words) == told
    assert not told or (f"SOLVER.WARMUP_ITERS is {warmup}" in words and "WARMUP_ITERS to 6 or less" in words)
    assert short_schedule(load_config("", [*schedule, "SOLVER.WARMUP_FACTOR", "1.0"])) == ""  # no warm-up
