"""Folders, lists, videos: what is written, what is said, what is passed over."""

import json
import os
import shlex

import cv2
import numpy as np
import pytest
from detectron2.modeling import build_model
from pycocotools.coco import COCO

from fpn_d2 import cli
from fpn_d2.checkpoint.contents import contents
from fpn_d2.cli.predict import EXAMPLE
from fpn_d2.data import register_from_config
from fpn_d2.engine import ReportingCheckpointer
from fpn_d2.errors import UserError
from fpn_d2.evaluation.coco_results import evaluate_predictions
from fpn_d2.inference import sources
from fpn_d2.inference.json_lines import JsonLines, read_lines
from fpn_d2.inference.predict import predict
from fpn_d2.inference.stream import detect
from tests.engine.small import small_config
from tests.inference.finder import finder, picture


def scene(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    return picture(height, width, (number % 3, 4 + number, 6, 24 + number, 26))


@pytest.fixture
def images(tmp_path):
    """Folder with five images in two sizes, one of them in a folder below, a broken one and a text."""
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    for number in range(5):
        size = (48, 64) if number % 2 else (64, 48)
        cv2.imwrite(str(folder / ("below" if number == 3 else "") / f"{number}.png"), scene(number, *size))
    (folder / "bad.jpg").write_bytes(b"\xff\xd8broken")
    (folder / "notes.md").write_text("no image")
    return folder


def lines_of(output) -> list[dict]:
    return list(read_lines(str(output / "predictions.jsonl")))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_folder(tmp_path, images, capsys, workers, batch_size):
    output = tmp_path / "out"
    summary = predict(finder(48, batch_size=batch_size), [str(images)], str(output), workers=workers, progress=False)
    assert (summary.images, summary.errors, summary.before) == (5, 1, 0)
    lines = lines_of(output)
    names = [os.path.relpath(line["file"], images) for line in lines]
    assert names == ["0.png", "1.png", "2.png", "4.png", "bad.jpg", os.path.join("below", "3.png")]
    for line, number in zip(lines, (0, 1, 2, 4, None, 3), strict=True):
        if number is None:
            assert "cannot be read as an image" in line["error"] and "detections" not in line
            continue
        (one,) = line["detections"]
        np.testing.assert_allclose(one["bbox"], [4 + number, 6, 20, 20], atol=0.01)
        assert (one["category_id"], one["category"]) == (number % 3 + 1, ["blue", "green", "red"][number % 3])
        assert (line["height"], line["width"]) == ((48, 64) if number % 2 else (64, 48))
    assert "bad.jpg cannot be read" in capsys.readouterr().err
    coco = COCO(str(output / "predictions.json"))
    assert len(coco.imgs) == 5 and len(coco.anns) == 5 and [c["name"] for c in coco.cats.values()][1] == "green"


def test_a_stopped_run_goes_on_and_tries_what_failed_again(tmp_path, images):
    output = tmp_path / "out"
    first = predict(finder(48), [str(images)], str(output), max_images=2, progress=False)
    assert first.images == 2 and len(lines_of(output)) == 2
    with open(output / "predictions.jsonl", "a") as file:
        file.write('{"file": "half of a li')  # as when it is killed
    second = predict(finder(48), [str(images)], str(output), progress=False)
    assert (second.before, second.images, second.errors) == (2, 3, 1)
    cv2.imwrite(str(images / "bad.jpg"), scene(1))
    third = predict(finder(48), [str(images)], str(output), progress=False)
    assert (third.before, third.images, third.errors) == (5, 1, 0)
    good = [line["file"] for line in lines_of(output) if "error" not in line]
    assert len(good) == len(set(good)) == 6
    assert len(COCO(str(output / "predictions.json")).imgs) == 6


def test_results_of_other_settings_are_not_mixed(tmp_path, images):
    output = str(tmp_path / "out")
    predict(finder(48), [str(images)], output, progress=False)
    with pytest.raises(UserError, match="min_score 0.0 there, 0.5 now.*--overwrite"):
        predict(finder(48, min_score=0.5), [str(images)], output, progress=False)
    again = predict(finder(48, min_score=0.5), [str(images)], output, progress=False, overwrite=True)
    assert again.before == 0 and again.images == 5
    (tmp_path / "out" / "predictions.jsonl").write_text("something else\n")
    with pytest.raises(UserError, match="something else than predictions"):
        predict(finder(48, min_score=0.5), [str(images)], output, progress=False)


def test_globs_lists_and_single_files(tmp_path, images, monkeypatch):
    def names(*given):
        return [os.path.relpath(item.name, images) for item in sources.items(given)]

    assert names(str(images / "*.png")) == ["0.png", "1.png", "2.png", "4.png"]
    assert names(str(images / "**" / "3.png")) == [os.path.join("below", "3.png")]
    (images / "list.txt").write_text("# of two\n1.png\n\nbelow/3.png\nmissing.png\n*4.png\nlist.txt\n")
    found = names(str(images / "list.txt"), str(images / "0.png"))
    assert found[:2] == ["1.png", os.path.join("below", "3.png")] and found[-1] == "0.png" and len(found) == 5
    assert sources.count([str(images), str(images / "1.png")]) == 7
    monkeypatch.setattr(sources, "_SORTED", 2)  # a folder too large to be put in order: all the same each once
    assert sorted(names(str(images))) == sorted(["0.png", "1.png", "2.png", "4.png", "bad.jpg", "below/3.png"])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], "nothing to predict on"),
        (["nowhere"], "no image, folder or video nowhere"),
        (["*.nothing"], "nothing matches"),
        (["camera:x"], "camera:0 for the first"),
    ],
)
def test_sources_that_are_not_there(tmp_path, given, text):
    with pytest.raises(UserError, match=text):
        predict(finder(), given, str(tmp_path / "out"), progress=False)


@pytest.fixture
def clip(tmp_path):
    """A video of nine frames in which a square moves to the right."""
    path = str(tmp_path / "clip.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 10.0, (64, 48))
    for number in range(9):
        writer.write(scene(3 * number))
    writer.release()
    return path


def test_video(tmp_path, clip):
    output = tmp_path / "out"
    summary = predict(finder(48, batch_size=2), [clip], str(output), pictures=True, progress=False)
    assert summary.images == 9
    for number, line in enumerate(lines_of(output)):
        assert line["file"] == f"{clip}#{number}" and line["video"] == clip
        assert line["frame"] == number and line["time"] == pytest.approx(number / 10)
        np.testing.assert_allclose(line["detections"][0]["bbox"], [4 + 3 * number, 6, 20, 20], atol=1.5)
    (written,) = [p for p in (output / "pictures").rglob("*.mp4")]
    drawn = [item.image for item in sources.frames(str(written))]
    assert len(drawn) == 9 and drawn[0].shape == (48, 64, 3)
    plain = [item.image for item in sources.frames(clip)]
    assert np.abs(drawn[4].astype(int) - plain[4]).max() > 100  # a box on it


def test_a_video_that_was_not_finished_is_drawn_anew(tmp_path, clip, images):
    output = tmp_path / "out"
    order = [str(images / "0.png"), clip]
    predict(finder(48), order, str(output), pictures=True, max_images=4, progress=False)
    assert not list((output / "pictures").rglob("clip.avi.mp4")) and len(lines_of(output)) == 4
    summary = predict(finder(48), order, str(output), pictures=True, progress=False)
    assert (summary.before, summary.images) == (1, 9)
    names = [line["file"] for line in lines_of(output)]
    assert len(names) == len(set(names)) == 10
    (written,) = (output / "pictures").rglob("clip.avi.mp4")
    assert len(list(sources.frames(str(written)))) == 9
    done = predict(finder(48), order, str(output), pictures=True, progress=False)
    assert (done.before, done.images) == (10, 0)


def test_broken_video_and_missing_camera_are_a_line(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    given = [str(tmp_path / "broken.mp4"), "camera:97"]
    summary = predict(finder(), given, str(tmp_path / "out"), progress=False)
    assert summary.errors == 2 and summary.images == 0
    assert [line["file"] for line in lines_of(tmp_path / "out")] == given


def test_camera(tmp_path, monkeypatch, clip):
    """A camera that is a video: its name, its number, and that its film is finished however the run ends."""
    opened, capture = [], cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda what: opened.append(what) or capture(clip))
    summary = predict(finder(48), ["camera:3"], str(tmp_path / "out"), pictures=True, max_images=5, progress=False)
    assert opened[0] == 3 and summary.images == 5
    assert (tmp_path / "out" / "pictures" / "camera_3.mp4").is_file()
    assert lines_of(tmp_path / "out")[4]["file"] == "camera:3#4"


def test_pictures_lie_as_the_images_do(tmp_path, images, monkeypatch):
    monkeypatch.chdir(images.parent)
    predict(finder(48), ["images"], "out", pictures=True, progress=False)
    assert (tmp_path / "out/pictures/images/below/3.png").is_file()
    picture = cv2.imread("out/pictures/images/0.png")
    assert picture.shape == (64, 48, 3) and (picture != cv2.imread("images/0.png")).any()
    assert not list((tmp_path / "out").rglob("*unfinished*"))


def test_memory_and_reading_ahead_are_bounded(images):
    asked = 0

    def endless():
        nonlocal asked
        while True:
            asked += 1
            yield sources.Item(str(asked), image=str(images / "0.png"))

    results = detect(finder(48, batch_size=2), endless(), workers=2)
    for _ in range(50):
        assert next(results).error is None
    results.close()
    assert asked < 50 + 40


def test_codes_of_done_images_take_eight_bytes_each(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(f'{{"file": "{i}.jpg"}}\n' for i in range(3000)) + '{"file": "x.jpg", "error": "e"}\n')
    lines = JsonLines(str(path))
    lines.close()
    assert len(lines) == 3000 and lines._done.nbytes == 24_000
    assert lines.holds("0.jpg") and lines.holds("2999.jpg") and not lines.holds("3000.jpg") and not lines.holds("x.jpg")


def test_an_interrupted_run_says_so_and_goes_on(tmp_path, images, monkeypatch):
    predictor = finder(48)
    calls = iter([None, None, KeyboardInterrupt])
    forward = predictor.model.forward

    def interrupted(inputs):
        if next(calls, None):
            raise KeyboardInterrupt
        return forward(inputs)

    monkeypatch.setattr(predictor.model, "forward", interrupted)
    summary = predict(predictor, [str(images)], str(tmp_path / "out"), progress=False)
    assert summary.stopped and summary.images == 2 and summary.coco is None
    assert predict(predictor, [str(images)], str(tmp_path / "out"), progress=False).before == 2


def truth(folder, images) -> str:
    """COCO annotations of the five images, whose ids and categories are in another order than the model's."""
    ids = {"blue": 7, "green": 3, "red": 5}
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for n, i in ids.items()]}
    for number, name in enumerate(["0.png", "1.png", "2.png", "below/3.png", "4.png"]):
        content["images"].append({"id": 100 - number, "file_name": name, "height": 48, "width": 64})
        one = {"id": number + 1, "image_id": 100 - number, "category_id": list(ids.values())[number % 3]}
        content["annotations"].append({**one, "bbox": [4 + number, 6, 20, 20], "area": 400, "iscrowd": 0})
    path = folder / "truth.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_ids_of_an_annotation_file_and_its_figures(tmp_path, images):
    path = truth(tmp_path, images)
    summary = predict(finder(48), [str(images)], str(tmp_path / "out"), annotations=path, progress=False)
    figures = evaluate_predictions(path, summary.coco)
    assert figures["AP"] == pytest.approx(100) and figures["AR"] == pytest.approx(100) and np.isnan(figures["APl"])
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    for one in content["annotations"][::2]:
        one["bbox"][0] += 8
    (tmp_path / "moved.json").write_text(json.dumps(content["annotations"]))
    moved = evaluate_predictions(path, str(tmp_path / "moved.json"))
    assert moved["AP"] < 50 < 100 * moved["AP50"]
    with pytest.raises(UserError, match="classes blue.*not among"):
        image = {"id": 1, "file_name": "a.jpg", "width": 9, "height": 9}
        other = {"images": [image], "categories": [{"id": 1, "name": "cat"}]}
        (tmp_path / "other.json").write_text(json.dumps(other))
        predict(finder(48), [str(images)], str(tmp_path / "o2"), annotations=str(tmp_path / "other.json"))


@pytest.fixture
def project(tmp_path, scenes, monkeypatch):
    """The files that the example in --help names."""
    cfg = small_config(tmp_path / "cfg", scenes, "MODEL.DEVICE", "cpu")
    register_from_config(cfg)
    folder = tmp_path / "output" / "my"
    folder.mkdir(parents=True)
    ReportingCheckpointer(build_model(cfg), str(folder), about=contents(cfg)).save("model_best")
    (tmp_path / "my" / "images").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "my" / "images" / "a.png"), scene(0, 64, 64))
    monkeypatch.chdir(tmp_path)
    writer = cv2.VideoWriter("my/clip.mp4", cv2.VideoWriter_fourcc(*"mp4v"), 5.0, (64, 48))
    for number in range(2):
        writer.write(scene(number))
    writer.release()
    return tmp_path


def test_the_example_in_help_runs(project, capsys):
    with pytest.raises(SystemExit):
        cli.main(["predict", "--help"])
    assert EXAMPLE in " ".join(capsys.readouterr().out.split())
    assert cli.main(shlex.split(EXAMPLE)[1:]) == 0
    assert capsys.readouterr().out == "3 images: output/predictions/predictions.json\n"
    assert len(list((project / "output/predictions/pictures").rglob("*.*"))) == 2


def test_exit_status_tells_of_bad_files_and_mistakes(project, capsys):
    (project / "my" / "images" / "bad.png").write_bytes(b"bad")
    checkpoint = "output/my/model_best.pth"
    assert cli.main(["predict", checkpoint, "my/images", "--output", "out"]) == 3
    out = capsys.readouterr()
    assert out.out == "1 images, 1 could not be read: out/predictions.json\n"
    assert "error: my/images/bad.png cannot be read" in out.err and "images/s" in out.err
    assert cli.main(["predict", checkpoint, "my/imagse", "--output", "out"]) == 2
    assert "did you mean images?" in capsys.readouterr().err
    assert cli.main(["predict", "output/my/model_bset.pth", "my/images", "--output", "out"]) == 2
    assert "did you mean model_best.pth?" in capsys.readouterr().err
