"""What timm is asked for by name: models, their weights, and the preprocessing that the weights expect."""

import contextlib
import difflib
import importlib
import logging
import os
from collections.abc import Iterator
from types import ModuleType

from detectron2.config import CfgNode
from torch import nn

from fpn_d2.checkpoint.reading import read_weights
from fpn_d2.errors import UserError

from .packaged_weights import is_packaged, packaged, read_packaged
from .timm_download import cannot_download, find_pretrained

PREPROCESSING = ("refuse", "ignore")


def require_timm() -> ModuleType:
    """Import timm.

    Raises:
        UserError: it is not installed; the message says what to do.
    """
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise UserError("this bottom-up pathway needs timm, which is not installed: pip install timm") from None


def check_name(name: str) -> None:
    """Look up ``name``, which may carry a tag of its weights as in ``resnet50.a1_in1k``.

    Raises:
        UserError: timm has no such model, or no such tag of it; the message names the closest ones.
    """
    timm = require_timm()
    model, _, tag = name.partition(".")
    if not timm.is_model(model):
        known = timm.list_models()
        longer = [other for other in known if model and other.startswith(model)]
        close = longer[:3] or difflib.get_close_matches(model, known, n=3, cutoff=0.5)
        advice = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists all, e.g. resnet50"
        raise UserError(f"MODEL.TIMM.NAME is {name!r}, which timm {timm.__version__} does not have; {advice}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{model}.*")]
    if tag and tag not in tags:
        raise UserError(f"MODEL.TIMM.NAME is {name!r}; timm's {model} has the weights {', '.join(tags) or 'none'}")


def create_model(name: str, options: dict, **more) -> nn.Module:
    """Call ``timm.create_model``.

    Raises:
        UserError: the model cannot be made so, because it has no feature maps or knows no such option, or its weights
            cannot be downloaded.
    """
    try:
        with _about_layers_that_are_left_out_timm_is_silent():
            model = require_timm().create_model(name, **(options | more))
    except OSError as error:
        if not more.get("pretrained"):
            raise
        raise cannot_download(name, " ".join(str(error).split())) from error
    except (TypeError, AttributeError, AssertionError, RuntimeError, KeyError, IndexError) as error:
        asked = ", ".join(
            f"{key}={value!r}" for key, value in (options | more).items() if key != "pretrained_cfg_overlay"
        )
        raise UserError(
            f"timm cannot make {name} with {asked} ({type(error).__name__}: {error}); choose another MODEL.TIMM.NAME, "
            "or other MODEL.TIMM.OPTIONS"
        ) from error
    for module in model.modules():  # timm keeps what it was told, which would go into every copy
        if isinstance(getattr(module, "pretrained_cfg", None), dict):
            module.pretrained_cfg.pop("state_dict", None)
    return model


@contextlib.contextmanager
def _about_layers_that_are_left_out_timm_is_silent() -> Iterator[None]:
    """Without its warning of weights for the layers behind the last map, which all weights of a classifier have."""

    def told(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Unexpected keys")

    logger = logging.getLogger("timm.models._builder")
    logger.addFilter(told)
    try:
        yield
    finally:
        logger.removeFilter(told)


def weight_source(name: str, options: dict, pretrained: bool, weights: str) -> dict:
    """Return the arguments of ``timm.create_model`` that load the weights asked for.

    They are first loaded into the whole model of ``name``, classifier and all, where every tensor has to match:
    timm itself is silent about tensors that fit nowhere as soon as there is no classifier.

    Args:
        name: of the model.
        options: arguments that the model is made with.
        pretrained: let timm download its own weights.
        weights: a file in timm's format for this model, .safetensors or .pth, or "package:" and the name of one of
            `packaged_weights.PACKAGES`; empty: none.

    Raises:
        UserError: both are asked for, there is no such file, it does not fit the model, or nothing can be downloaded.
    """
    if not weights:
        downloaded = find_pretrained(name, pretrained_cfg(name)) if pretrained else ""
        return {"pretrained": pretrained} | ({"pretrained_cfg_overlay": {"file": downloaded}} if downloaded else {})
    if pretrained:
        raise UserError(f"MODEL.TIMM.PRETRAINED is True and MODEL.TIMM.WEIGHTS is {weights}; set only one of them")
    if is_packaged(weights):
        state = read_packaged(weights, name)
        overlay = {"state_dict": state}
    else:
        state = _read_file(weights)
        overlay = {"file": str(weights)}
    classifier = pretrained_cfg(name).classifier or ()
    heads = [classifier] if isinstance(classifier, str) else list(classifier)
    sizes = [len(state[f"{head}.weight"]) for head in heads if f"{head}.weight" in state]
    # As many classes as the weights have: then timm loads strictly.
    overlay["num_classes"] = sizes[0] if sizes else 0
    whole = {"pretrained": True, "num_classes": overlay["num_classes"], "pretrained_cfg_overlay": overlay}
    try:
        require_timm().create_model(name, **(options | whole))
    except (RuntimeError, KeyError) as error:
        raise UserError(f"MODEL.TIMM.WEIGHTS {weights} does not fit timm's {name}: {error}") from error
    return {"pretrained": True, "pretrained_cfg_overlay": overlay}


def _read_file(weights: str) -> dict:
    """The tensors of a file, under timm's names."""
    if not os.path.isfile(weights):
        raise UserError(f"MODEL.TIMM.WEIGHTS is {weights!r}, but there is no such file")
    require_timm()
    from timm.models import load_state_dict

    try:
        read_weights(weights)  # first: timm's own reader may, in some of its versions, run what a file holds
        return load_state_dict(weights)
    except Exception as error:  # whatever torch, safetensors or pickle say of bytes that are something else
        raise UserError(f"MODEL.TIMM.WEIGHTS {weights} cannot be read as weights: {error}") from error


def pretrained_cfg(name: str):
    """Return timm's description of the weights of ``name``: mean, std, input size, classifier.

    Raises:
        UserError: timm has none.
    """
    require_timm()
    from timm.models import get_pretrained_cfg

    check_name(name)
    found = get_pretrained_cfg(name)
    if found is None:
        raise UserError(f"timm says nothing about the weights of {name}; set MODEL.TIMM.PREPROCESSING to ignore")
    return found


def expected_preprocessing(name: str) -> tuple[str, list[float], list[float]]:
    """Return what the weights of the timm model ``name`` expect: INPUT.FORMAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD.

    Mean and standard deviation are in units of 0 to 255, in the order of the format, as Detectron2 has them.
    """
    found = pretrained_cfg(name)
    return "RGB", [round(255 * x, 3) for x in found.mean], [round(255 * x, 3) for x in found.std]


def check_preprocessing(cfg: CfgNode) -> None:
    """Compare ``cfg`` with what the weights expect that MODEL.TIMM.PRETRAINED or MODEL.TIMM.WEIGHTS ask for.

    Raises:
        UserError: they differ; the message has the three lines to put into the configuration.
    """
    keys = cfg.MODEL.TIMM
    if keys.PREPROCESSING not in PREPROCESSING:
        raise UserError(f"MODEL.TIMM.PREPROCESSING is {keys.PREPROCESSING!r}; expected refuse or ignore")
    if keys.PREPROCESSING == "ignore" or not (keys.PRETRAINED or keys.WEIGHTS):
        return
    name = model_name(cfg)
    image_format, mean, std = expected_preprocessing(name)
    pairs = [*zip(cfg.MODEL.PIXEL_MEAN, mean, strict=False), *zip(cfg.MODEL.PIXEL_STD, std, strict=False)]
    if cfg.INPUT.FORMAT != image_format or any(abs(a - b) > 0.05 for a, b in pairs):
        raise UserError(
            f"the weights of timm's {name} expect other images than the configuration makes; put\n"
            f'INPUT.FORMAT: "{image_format}"\nMODEL.PIXEL_MEAN: {mean}\nMODEL.PIXEL_STD: {std}\n'
            "there, or set MODEL.TIMM.PREPROCESSING to ignore"
        )


def model_name(cfg: CfgNode) -> str:
    """MODEL.TIMM.NAME, or where that is empty the model of the package that MODEL.TIMM.WEIGHTS names; "": neither."""
    keys = cfg.MODEL.TIMM
    return packaged(keys.WEIGHTS).model if not keys.NAME and is_packaged(keys.WEIGHTS) else keys.NAME


def without_timm_weights(cfg: CfgNode) -> CfgNode:
    """A copy of ``cfg``, frozen as it is, for a model that gets all its weights from a checkpoint.

    What its training started from may be gone, or may never have been on this machine.
    """
    copy = cfg.clone()
    copy.defrost()
    copy.MODEL.TIMM.NAME = model_name(cfg)
    copy.MODEL.TIMM.PRETRAINED, copy.MODEL.TIMM.WEIGHTS = False, ""
    if cfg.is_frozen():
        copy.freeze()
    return copy


def timm_arguments(cfg: CfgNode) -> dict:
    """Read the keys of ``cfg.MODEL.TIMM`` that every pathway through timm has.

    Raises:
        UserError: no model is named, or the images are not as its weights expect them.
    """
    keys = cfg.MODEL.TIMM
    name = model_name(cfg)
    if not name:
        raise UserError(f"{cfg.MODEL.FPN.BOTTOM_UP} needs a timm model: set MODEL.TIMM.NAME, e.g. to resnet50")
    check_preprocessing(cfg)
    return {
        "name": name,
        "pretrained": keys.PRETRAINED,
        "weights": keys.WEIGHTS,
        "options": pairs_to_options(keys.OPTIONS, "MODEL.TIMM.OPTIONS"),
        "drop_path": keys.DROP_PATH,
        "gradient_checkpointing": cfg.MODEL.BACKBONE.GRADIENT_CHECKPOINTING,
        "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
    }


def pairs_to_options(pairs: list, key: str) -> dict:
    """Turn ``[[name, value], ...]`` into keyword arguments.

    Raises:
        UserError: it is not such a list; the message names ``key``.
    """
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise UserError(f'{key} is {pairs}; expected pairs [name, value], as in [["img_size", 256]]')
    return dict(pairs)
