"""What a data set looks like: histograms of its objects over images with their boxes, in one picture."""

import io
import os

import cv2
import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpn_d2.analysis.errors.detections import Objects, Scored, objects_of, take
from fpn_d2.analysis.level_rule import Rule
from fpn_d2.data.check import check_set
from fpn_d2.data.coco_annotations import CheckOptions
from fpn_d2.data.defects import STOP
from fpn_d2.data.image_loading import read_image
from fpn_d2.errors import UserError, one_line, shown
from fpn_d2.files import writable_folder
from fpn_d2.inference.drawing import colour, draw, write

_WIDTH, _COLUMNS, _GAP = 1480, 4, 4  # pixels of the picture; images beside each other; pixels between them
_MOST_CLASSES = 20  # that have a bar of their own


def read_set(source: str, images: str | None = None, split: str | None = None) -> Scored:
    """Read a data set as it would be used: without what `fpn-d2 data check` says to leave out.

    Args:
        source: a COCO json, a Pascal VOC folder, or the name of a registered set.
        images: folder of the json's images; None: only boxes are looked at.
        split: list of a VOC folder.

    Returns:
        The set, with whole paths of the images as ``files``; there are no detections.

    Raises:
        UserError: there is no such set, or nothing in it can be used.
    """
    found = check_set(source, CheckOptions(training=False, outside=True), images=images, split=split)
    if found.report.kinds(STOP):
        raise UserError(f"{found.report.source} cannot be shown: {found.report.reasons()}")
    content: dict[str, list[dict]] = {"images": [], "annotations": [], "categories": []}
    for key, index, record in found.repaired():
        if index is not None and key in content:
            content[key].append(record)
    categories = sorted(content["categories"], key=lambda one: one["id"])
    place = {image["id"]: number for number, image in enumerate(content["images"])}
    label = {category["id"]: number for number, category in enumerate(categories)}
    folder = "" if found.image_folder is None else str(found.image_folder)
    files = [os.path.join(folder, image["file_name"]) for image in content["images"]]
    sizes = np.array([[image["height"], image["width"]] for image in content["images"]], float).reshape(-1, 2)
    truth = objects_of(content["annotations"], place, label, source)
    return Scored(files, sizes, [one["name"] for one in categories], truth, take(truth, np.arange(0)))


def show_set(data: Scored, rule: Rule, output: str, count: int = 12, seed: int | None = None) -> str:
    """Write the picture of a data set.

    Args:
        data: as `read_set` gives it.
        rule: for the levels of the objects.
        output: the file, ".png" or ".jpg".
        count: images to show.
        seed: choose them at random with this seed; None: spread evenly over the set.

    Returns:
        Figures in words, one a line.

    Raises:
        UserError: the file cannot be written.
    """
    ending = os.path.splitext(output)[1].lower()
    if ending not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"the picture {output} has no ending that is known: call it .jpg or .png")
    rows = [_pixels(histograms(data, rule))]
    if count and data.files and os.path.isfile(data.files[0]):
        rows.append(samples(data, count, seed))
    picture = np.vstack(rows)
    writable_folder(os.path.dirname(os.path.abspath(output)))
    if not cv2.imwrite(output, picture, [] if ending == ".png" else [cv2.IMWRITE_JPEG_QUALITY, 85]):
        raise UserError(f"the picture {os.path.abspath(output)} cannot be written")
    return words(data, rule)


def words(data: Scored, rule: Rule) -> str:
    """How many images, objects, classes; sizes; levels."""
    truth = take(data.truth, ~data.truth.crowd)
    per_image = np.bincount(truth.image, minlength=len(data.files))
    sides = np.sqrt(truth.area)
    levels, _ = _levels(data, rule, truth)
    low, middle, high = np.quantile(sides, [0.05, 0.5, 0.95]) if len(sides) else (0, 0, 0)
    empty = int((per_image == 0).sum())
    return "\n".join([
        f"{len(data.files)} images, {len(truth)} objects of {len(data.class_names)} classes"
        + (f", {int(data.truth.crowd.sum())} crowds" if data.truth.crowd.any() else ""),
        f"objects per image: {per_image.mean() if len(per_image) else 0:.1f} on average, "
        f"{per_image.max(initial=0)} at most; {empty} images without",
        f"sides in pixels of the images: {low:.0f} to {high:.0f} for nine of ten, {middle:.0f} in the middle",
        "levels: " + ", ".join(f"p{k} {100 * share:.0f} %" for k, share in zip(rule.levels, levels, strict=True)),
    ])  # fmt: skip


def histograms(data: Scored, rule: Rule) -> Figure:
    """Sizes of images and objects, shapes, classes, objects per image, places, and levels; crowds left out."""
    truth = take(data.truth, ~data.truth.crowd)
    side = truth.box[:, 2:] - truth.box[:, :2]
    figure = Figure(figsize=(_WIDTH / 100, 6.2), dpi=100, layout="constrained")
    figure.suptitle(words(data, rule).splitlines()[0], fontsize=13)
    ((classes, per_image, sizes, levels), (pictures, shapes, places, ratios)) = figure.subplots(2, 4)
    _classes(classes, data, truth)
    number = np.bincount(truth.image, minlength=len(data.files))
    step = max(1, -(-int(number.max(initial=1)) // 25))
    per_image.hist(number, np.arange(0, number.max(initial=1) + step + 1, step) - 0.5, color="tab:blue")
    per_image.set(title="objects per image", xlabel="objects", ylabel="images")
    _logarithmic(sizes, np.sqrt(side.prod(1)))
    sizes.set(title="size of objects", xlabel="side of a square as large, pixels of the image", ylabel="objects")
    shares, sides = _levels(data, rule, truth)
    names = [f"p{k}" for k in rule.levels]
    bars = levels.bar(names, 100 * shares, color="tab:blue")
    levels.bar_label(bars, [f"{100 * share:.0f}" for share in shares])
    seen = f"{np.median(sides):.0f}" if len(sides) else "-"
    levels.set(title=f"level ({rule.words()}); median {seen} pixels", ylabel="% of the objects", ylim=(0, 112))
    levels.set_xlabel(f"at the network's size, {rule.min_size} to {rule.max_size}")
    together, counts = np.unique(data.sizes, axis=0, return_counts=True)
    if len(together):
        area = 15 + 150 * counts / counts.max()
        pictures.scatter(together[:, 1], together[:, 0], s=area, alpha=0.6, color="tab:blue", edgecolors="none")
    pictures.set(title="size of images", xlabel="width", ylabel="height")
    pictures.set_xlim(0, 1.1 * data.sizes[:, 1].max(initial=1))
    pictures.set_ylim(0, 1.1 * data.sizes[:, 0].max(initial=1))
    _logarithmic(shapes, side[:, 0] / np.maximum(side[:, 1], 1e-6))
    shapes.set(title="shape of objects", xlabel="width / height", ylabel="objects")
    centre = (truth.box[:, :2] + truth.box[:, 2:]) / 2 / data.sizes[truth.image][:, ::-1]
    heat, _, _ = np.histogram2d(centre[:, 1], centre[:, 0], bins=24, range=[[0, 1], [0, 1]])
    places.imshow(heat, cmap="viridis", extent=(0, 1, 1, 0), aspect="auto")
    places.set(title="centres of objects", xlabel="share of the width", ylabel="share of the height")
    _logarithmic(ratios, np.sqrt(side.prod(1) / data.sizes[truth.image].prod(1)))
    ratios.set(title="object / image", xlabel="side of the object / side of the image", ylabel="objects")
    return figure


def _classes(axes: Axes, data: Scored, truth: Objects) -> None:
    number = np.bincount(truth.label, minlength=len(data.class_names))
    order = np.argsort(-number, kind="stable")
    shown_ones = order[:_MOST_CLASSES]
    names = [shown(data.class_names[i], 18) for i in shown_ones]
    values, colours = number[shown_ones], [_rgb(i) for i in shown_ones]
    if len(order) > _MOST_CLASSES:
        names.append(f"{len(order) - _MOST_CLASSES} others")
        values, colours = np.append(values, number[order[_MOST_CLASSES:]].sum()), [*colours, (0.6, 0.6, 0.6)]
    bars = axes.barh(range(len(names)), values, color=colours)
    axes.bar_label(bars, padding=2, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(title="classes", xlabel="objects", xlim=(0, 1.2 * max(number.max(initial=1), 1)))
    axes.invert_yaxis()


def _rgb(label: int) -> tuple[float, float, float]:
    blue, green, red = colour(int(label))
    return red / 255, green / 255, blue / 255


def _levels(data: Scored, rule: Rule, truth: Objects) -> tuple[np.ndarray, np.ndarray]:
    """Share of the objects on each level, and the sides of all at the network's size."""
    scales = rule.scales(data.sizes)[truth.image] if len(data.files) else np.zeros(0)
    level = rule.assign(truth.box, scales)
    return np.array([(level == k).mean() if len(level) else 0.0 for k in rule.levels]), np.sqrt(truth.area) * scales


def _logarithmic(axes: Axes, values: np.ndarray) -> None:
    values = values[(values > 0) & np.isfinite(values)]
    if not len(values):
        return
    low, high = np.floor(np.log2(values.min()) * 4) / 4, np.log2(values.max())
    axes.hist(values, 2.0 ** np.arange(low, high + 0.5, 0.25), color="tab:blue")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 0.1 else f"{value:.2g}")


def _pixels(figure: Figure) -> np.ndarray:
    """The figure as (H, W, 3), BGR."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_COLOR)


def samples(data: Scored, count: int, seed: int | None = None) -> np.ndarray:
    """Images with the boxes of their objects in the colours of the classes, (H, W, 3), BGR.

    The colours are those of the bars; crowds are white. An image that cannot be read is a tile that says so.
    """
    count = min(count, len(data.files))
    if seed is None:
        chosen = np.linspace(0, len(data.files) - 1, count).round().astype(int)
    else:
        chosen = np.sort(np.random.default_rng(seed).choice(len(data.files), count, replace=False))
    width = (_WIDTH - (_COLUMNS - 1) * _GAP) // _COLUMNS
    tiles = [_tile(data, int(image), width) for image in chosen]
    rows = [tiles[i : i + _COLUMNS] for i in range(0, len(tiles), _COLUMNS)]
    picture = []
    for row in rows:
        height = max(tile.shape[0] for tile in row)
        line = np.full((height + _GAP, _WIDTH, 3), 255, np.uint8)
        for number, tile in enumerate(row):
            left = number * (width + _GAP)
            line[: tile.shape[0], left : left + width] = tile
        picture.append(line)
    return np.vstack(picture)


def _tile(data: Scored, image: int, width: int) -> np.ndarray:
    name = os.path.basename(data.files[image])
    try:
        pixels = np.ascontiguousarray(read_image(data.files[image], "BGR"))
    except Exception as error:  # on a broken file the decoders raise almost anything
        tile = np.full((width * 3 // 4, width, 3), 235, np.uint8)
        write(tile, shown(f"{name}: {one_line(error)}", 60), (4, 40), (235, 235, 235))
        return tile
    scale = min(width / pixels.shape[1], 1.2 * width / pixels.shape[0])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    small = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=how)
    objects = take(data.truth, data.truth.image == image)
    boxes = Boxes(torch.tensor(objects.box * scale))
    drawn = Instances(small.shape[:2], pred_boxes=boxes, scores=torch.ones(len(objects)))
    drawn.pred_classes = torch.tensor(objects.label)
    small = draw(small, drawn, data.class_names, scores=False)
    for x1, y1, x2, y2 in (objects.box[objects.crowd] * scale).round().astype(int).tolist():
        cv2.rectangle(small, (x1, y1), (x2, y2), (255, 255, 255), 2)
    tile = np.full((small.shape[0], width, 3), 245, np.uint8)
    small = small[:, :width]
    left = (width - small.shape[1]) // 2
    tile[:, left : left + small.shape[1]] = small
    write(tile, shown(name, 40), (0, tile.shape[0]), (235, 235, 235))
    return tile
