"""Error types on cases made by hand, and against the package of TIDE's authors where it is installed."""

import importlib
import sys
import types

import numpy as np
import pytest

from fpn_d2.analysis.errors import tide
from fpn_d2.analysis.errors.detections import Objects, Scored, take

A, B = 0, 1


def scored(truth: list, found: list, images: int = 1) -> Scored:
    """Rows of (image, class, x1, y1, x2, y2), of detections (..., score), of crowds (..., True)."""

    def objects(rows: list, detections: bool) -> Objects:
        table = np.array([row[:6] for row in rows], float).reshape(-1, 6)
        more = [row[6] if len(row) > 6 else False for row in rows]
        score = np.array(more if detections else np.ones(len(rows)), float)
        crowd = np.zeros(len(rows), bool) if detections else np.array(more, bool)
        made = Objects(table[:, 0].astype(int), table[:, 1].astype(int), table[:, 2:], score, crowd)
        return take(made, np.lexsort((-score, made.image)))

    sizes = np.full((images, 2), 100.0)
    return Scored([f"{i}.jpg" for i in range(images)], sizes, ["a", "b"], objects(truth, False), objects(found, True))


def kinds(errors: tide.Errors) -> list[str]:
    names = {tide.TRUE: "true", tide.IGNORED: "ignored", **dict(enumerate(tide.KINDS))}
    return [names[kind] for kind in errors.kind]


SQUARE = (10, 10, 50, 50)


@pytest.mark.parametrize(
    ("label", "box", "kind"),
    [
        (A, (10, 10, 50, 50), "true"),
        (A, (10, 10, 50, 70), "true"),  # IoU 0.67
        (A, (30, 10, 70, 50), "localisation"),  # 0.33
        (B, (10, 10, 50, 50), "classification"),
        (B, (30, 10, 70, 50), "both"),
        (A, (60, 60, 90, 90), "background"),
        (B, (48, 48, 90, 90), "background"),  # 0.001
    ],
)
def test_one_detection(label, box, kind):
    errors = tide.find_errors(scored([(0, A, *SQUARE)], [(0, label, *box, 0.9)]))
    assert kinds(errors) == [kind]
    assert errors.missed.tolist() == [kind in ("both", "background")]
    assert errors.matched.tolist() == [0 if kind == "true" else -1]


def test_the_worse_of_two_is_a_duplicate_whatever_their_iou():
    errors = tide.find_errors(scored([(0, A, *SQUARE)], [(0, A, *SQUARE, 0.5), (0, A, 10, 10, 50, 60, 0.9)]))
    assert kinds(errors) == ["true", "duplicate"] and errors.target.tolist() == [0, 0]


def test_a_detection_takes_the_object_that_is_left():
    objects = [(0, A, 10, 10, 50, 50), (0, A, 15, 10, 55, 50)]
    errors = tide.find_errors(scored(objects, [(0, A, 11, 10, 51, 50, 0.9), (0, A, 11, 10, 51, 50, 0.8)]))
    assert kinds(errors) == ["true", "true"] and sorted(errors.target.tolist()) == [0, 1]


def test_other_images_do_not_count():
    data = scored([(0, A, *SQUARE), (2, A, *SQUARE)], [(1, A, *SQUARE, 0.9), (2, A, *SQUARE, 0.8)], images=3)
    errors = tide.find_errors(data)
    assert kinds(errors) == ["background", "true"] and errors.missed.tolist() == [True, False]


def test_what_lies_in_a_crowd_of_its_class_counts_for_nothing():
    truth = [(0, A, *SQUARE), (0, A, 60, 60, 100, 100, True)]
    found = [(0, A, *SQUARE, 0.9), (0, A, 65, 65, 80, 80, 0.95), (0, B, 65, 65, 80, 80, 0.94)]
    errors = tide.find_errors(scored(truth, found))
    assert kinds(errors) == ["ignored", "background", "true"]
    assert tide.mean_ap(scored(truth, found[:2]), tide.find_errors(scored(truth, found[:2]))) == pytest.approx(100)
    assert not errors.missed.any()


def test_costs_of_single_errors():
    """Two objects of class a; one is found, at the other the detection is wrong: AP is 50, or 51 of 101 points."""
    truth = [(0, A, *SQUARE), (0, A, 60, 60, 90, 90)]
    right = (0, A, *SQUARE, 0.9)
    for second, kind in (
        ((0, A, 75, 60, 105, 90, 0.8), "localisation"),
        ((0, B, 60, 60, 90, 90, 0.8), "classification"),
        (None, "missed"),
    ):
        data = scored(truth, [right] + ([second] if second else []))
        errors = tide.find_errors(data)
        base = 100 * 51 / 101 / (2 if kind == "classification" else 1)  # class b has a detection and no object
        assert tide.mean_ap(data, errors) == pytest.approx(base)
        costs = tide.costs(data, errors)
        assert costs[kind] == pytest.approx(100 - base)
        assert {k for k, v in costs.items() if v} == {kind}


def test_a_better_background_detection_costs_precision():
    data = scored([(0, A, *SQUARE)], [(0, A, 60, 60, 90, 90, 0.9), (0, A, *SQUARE, 0.8)])
    errors = tide.find_errors(data)
    assert tide.mean_ap(data, errors) == pytest.approx(50)
    assert tide.costs(data, errors) == pytest.approx({**dict.fromkeys(tide.KINDS, 0.0), "background": 50})
    none = np.zeros(2, bool)
    assert tide.costs(data, errors, detections=none)["background"] == 0


@pytest.mark.parametrize(("truth", "found"), [([], []), ([(0, A, *SQUARE)], []), ([], [(0, A, *SQUARE, 0.9)])])
def test_nothing_there_or_nothing_found(truth, found):
    data = scored(truth, found)
    errors = tide.find_errors(data)
    assert kinds(errors) == ["background"] * len(found) and errors.missed.tolist() == [True] * len(truth)
    ap = tide.mean_ap(data, errors)
    assert ap == 0 or (np.isnan(ap) and not truth and not found)


def random_data(seed: int, images: int = 60) -> Scored:
    """Objects, and detections near them, of the right class or another, or anywhere; all scores differ."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for image in range(images):
        for _ in range(rng.integers(0, 6)):
            corner, side = rng.uniform(0, 60, 2), rng.uniform(8, 40, 2)
            label = int(rng.integers(0, 2))
            truth.append((image, label, *corner, *(corner + side), bool(rng.random() < 0.1)))
            for _ in range(rng.integers(0, 4)):
                moved = corner + rng.normal(0, 0.25, 2) * side
                other = label if rng.random() < 0.7 else 1 - label
                found.append((image, other, *moved, *(moved + side * rng.uniform(0.7, 1.4, 2)), rng.random()))
        corner = rng.uniform(0, 60, 2)
        found.append((image, int(rng.integers(0, 2)), *corner, *(corner + 20), rng.random()))
    return scored(truth, found, images)


@pytest.fixture
def tidecv(monkeypatch):
    """The package of TIDE's authors; what it imports for figures alone may be missing."""
    for name in ("seaborn", "pandas", "appdirs"):
        if importlib.util.find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(user_data_dir=None, DataFrame=None))
    return types.SimpleNamespace(
        run=pytest.importorskip("tidecv.quantify").TIDERun, data=importlib.import_module("tidecv.data").Data
    )


@pytest.mark.parametrize("seed", range(3))
def test_against_the_package_of_its_authors(tidecv, seed):
    data = random_data(seed)
    truth, found = tidecv.data("truth"), tidecv.data("found")
    for number, name in enumerate(data.class_names):
        truth.add_class(number, name)
    for number, name in enumerate(data.files):
        truth.add_image(number, name)
    for rows, of in ((data.truth, truth), (data.found, found)):
        for i in range(len(rows)):
            box = [*rows.box[i, :2], *(rows.box[i, 2:] - rows.box[i, :2])]
            where = int(rows.image[i]), int(rows.label[i])
            if of is found:
                of.add_detection(*where, float(rows.score[i]), box)
            else:
                (of.add_ignore_region if rows.crowd[i] else of.add_ground_truth)(*where, box)
    theirs = tidecv.run(truth, found, 0.5, 0.1, "bbox", 100)
    ours = tide.find_errors(data)
    assert tide.mean_ap(data, ours) == pytest.approx(theirs.ap, abs=1e-9) and theirs.ap > 5
    costs = {kind.short_name: cost for kind, cost in theirs.fix_main_errors().items()}
    short = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
    assert list(tide.costs(data, ours).values()) == pytest.approx([costs[name] for name in short], abs=1e-9)
    assert min(costs[name] for name in ("Cls", "Loc", "Bkg", "Miss")) > 0
