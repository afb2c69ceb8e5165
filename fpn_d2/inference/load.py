"""From a weight file to a predictor."""

import logging
import os
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from fpn_d2.checkpoint.checkpointer import ReportingCheckpointer
from fpn_d2.checkpoint.contents import KEY, classes_of_data
from fpn_d2.checkpoint.reading import read_checkpoint
from fpn_d2.config import add_fpn_d2_config
from fpn_d2.config_files import check_value, merge_config_file, parse_config
from fpn_d2.config_names import find_config
from fpn_d2.errors import UserError, not_found
from fpn_d2.modeling import without_timm_weights

from .optimize import optimize_for_inference
from .predictor import Predictor, number_of_classes
from .tiles import Tiling

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    path: str | os.PathLike,
    *,
    config: str | os.PathLike | CfgNode | None = None,
    device: str | torch.device | None = None,
    optimize: bool = True,
    dtype: torch.dtype | str | None = None,
    class_names: Sequence[str] = (),
    opts: Sequence[str] = (),
    batch_size: int = 1,
    min_score: float = 0.0,
    tile: int | None = None,
    overlap: float = 0.2,
) -> Predictor:
    """Make a predictor of a checkpoint.

    Args:
        path: a checkpoint of this package's trainer, which holds all that is needed; or weights in any format that
            Detectron2 reads, an address of its model zoo among them, together with ``config``.
        config: what the weights were trained with: a YAML file, a name in Detectron2's model zoo or of ours, or the
            configuration itself. None: what the checkpoint holds, else the file ``config.yaml`` beside it, which
            Detectron2's trainers write.
        device: "cpu", "cuda", "cuda:1"; None: the GPU if there is one.
        optimize: whether to run the copy out of `optimize_for_inference`: the same detections, sooner.
        dtype: ``torch.bfloat16`` or ``torch.float16``, or their names, for lower precision; needs ``optimize``.
        class_names: names of the classes; by default those in the checkpoint, or of the configuration's data set.
        opts: ``[KEY, value, ...]`` on top of the configuration, as ["INPUT.MIN_SIZE_TEST", "1200"].
        batch_size: most images, or tiles, in a batch.
        min_score: detections with a lower score are left out.
        tile: side in pixels of the tiles that images are cut into; None: each is shown whole.
        overlap: share of a tile that its neighbours see too.

    Returns:
        A predictor, called with an image or a list of images: see :meth:`Predictor.__call__`.

    Raises:
        UserError: there is no such file, it does not say how to build its model, or something does not fit; the text
            says what to do.

    Example:
        >>> predictor = fpn_d2.load("output/my/model_best.pth")
        >>> predictor = fpn_d2.load(
        ...     "model_final_280758.pkl", config="COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml", dtype="bfloat16"
        ... )
    """
    path = os.path.expanduser(os.fspath(path))
    dtype = _dtype(dtype, optimize)
    tiling = None if tile is None else Tiling(tile, overlap)
    cfg, held = configuration_of(path, config, opts)
    cfg.defrost()
    cfg.MODEL.DEVICE = _device(device)
    cfg.MODEL.WEIGHTS = path
    cfg = without_timm_weights(cfg)
    cfg.freeze()
    model = build_model(cfg).eval()
    ReportingCheckpointer(model, save_to_disk=False, partial_weights=cfg.MODEL.PARTIAL_WEIGHTS, whole=True).load(path)
    if optimize:
        model = optimize_for_inference(model, dtype)
    classes = held.get("classes") or classes_of_data(cfg)
    count = number_of_classes(cfg)
    names, ids = classes.get("thing_classes", ()), classes.get("thing_ids", ())
    return Predictor(
        model,
        cfg,
        class_names=class_names or (names if len(names) == count else ()),
        category_ids=ids if len(ids) == count and all(isinstance(i, int) for i in ids) else (),
        batch_size=batch_size,
        min_score=min_score,
        tiling=tiling,
    )


def configuration_of(
    path: str | os.PathLike, config: str | os.PathLike | CfgNode | None = None, opts: Sequence[str] = ()
) -> tuple[CfgNode, dict]:
    """The configuration of a checkpoint, and what it holds besides; no model is built.

    Args:
        path: as for `load`.
        config: as for `load`.
        opts: as for `load`.

    Returns:
        The configuration, frozen, and `fpn_d2.checkpoint.contents.contents`; empty where the file has none.

    Raises:
        UserError: as for `load`.
    """
    path = os.path.expanduser(os.fspath(path))
    held, shapes = _look_into(path)
    cfg = _configuration(path, config, held)
    _merge_options(cfg, list(opts))
    _set_number_of_classes(cfg, shapes)
    cfg.freeze()
    return cfg, held


def _dtype(dtype: torch.dtype | str | None, optimize: bool) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise UserError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}")
        dtype = _DTYPES[dtype]
    if dtype not in (None, torch.float32) and not optimize:
        raise UserError(f"dtype {str(dtype).removeprefix('torch.')} needs optimize=True")
    return dtype


def _device(device: str | torch.device | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise UserError(f"the device is {str(device)!r}; expected cpu, cuda or cuda:N") from None
    if kind.type == "cuda" and (not torch.cuda.is_available() or (kind.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"the device {device} was asked for, but there is no such GPU that PyTorch can use: take cpu")
    return str(device)


def _look_into(path: str) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """What a checkpoint says about its model, and the shapes of its weights; nothing for files of other kinds.

    What is wrong with a file is said when its weights are loaded.
    """
    if not os.path.isfile(path):
        return {}, {}
    try:
        loaded = read_checkpoint(path)
    except UserError:
        return {}, {}
    weights = loaded["model"]
    held = loaded.get(KEY)
    shapes = {name: tuple(value.shape) for name, value in weights.items() if isinstance(value, torch.Tensor)}
    return held if isinstance(held, dict) else {}, shapes


def _configuration(path: str, config: str | os.PathLike | CfgNode | None, held: dict) -> CfgNode:
    if isinstance(config, CfgNode):
        cfg = config.clone()
        cfg.defrost()
        add_fpn_d2_config(cfg)
        return cfg
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    if config is not None:
        _merge_file(cfg, os.fspath(config))
    elif "config" in held:
        text = parse_config(held["config"], f"the configuration in {path}")
        _merge(cfg, lambda: cfg.merge_from_other_cfg(CfgNode(text)), f"the one in {path}")
    elif os.path.isfile(beside := os.path.join(os.path.dirname(os.path.abspath(path)), "config.yaml")):
        logger.info("%s holds no configuration: taking %s", path, beside)
        _merge_file(cfg, beside)
    elif "://" not in path and not os.path.isfile(path):
        raise UserError(f"there is no checkpoint {path}: {not_found(path)}")
    else:
        raise UserError(
            f"{path} does not say how to build its model, and there is no config.yaml beside it: name what it was "
            "trained with as config (--config), a YAML file or a name in Detectron2's model zoo"
        )
    return cfg


def _merge_file(cfg: CfgNode, config: str) -> None:
    file = find_config(config, zoo_first=True)
    _merge(cfg, lambda: merge_config_file(cfg, str(file)), str(file))


def _merge_options(cfg: CfgNode, opts: list[str]) -> None:
    if len(opts) % 2:
        raise UserError(f"options are KEY VALUE pairs, but {opts[-1]!r} is left without a partner: {opts}")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        check_value(key, value)
    _merge(cfg, lambda: cfg.merge_from_list(opts), "the options")


def _merge(cfg: CfgNode, merge, what: str) -> None:
    try:
        merge()
    except (KeyError, ValueError, TypeError, AttributeError, AssertionError, OSError) as error:
        said = " ".join(str(error.args[0] if error.args else error).split())
        raise UserError(f"the configuration, {what}, cannot be used: {said}") from error


def _set_number_of_classes(cfg: CfgNode, shapes: dict[str, tuple[int, ...]]) -> None:
    """Take the number of classes from the weights: a configuration may leave it to the data, which is not here."""
    for name in ("roi_heads.box_predictor.cls_score.weight", "roi_heads.box_predictor.0.cls_score.weight"):
        if name in shapes and "RetinaNet" not in cfg.MODEL.META_ARCHITECTURE:
            cfg.MODEL.ROI_HEADS.NUM_CLASSES = shapes[name][0] - 1  # and one for the background
