"""From a YAML file and command-line options to a checked configuration, and from that to what can be run here."""

import ast
import contextlib
import logging
import re
from collections.abc import Iterator, Sequence

from detectron2.config import CfgNode, get_cfg

from fpn_d2.config import add_fpn_d2_config
from fpn_d2.config_files import check_value, merge_config_file
from fpn_d2.data import class_names, register_from_config
from fpn_d2.errors import UserError, did_you_mean

from .checks import check_data_names, check_names
from .device import known_device
from .numbers import check_numbers

# No configuration sets a number of classes to this: a value that follows it was left open.
_LEFT_OPEN = -1
WITH_CLASSES = ("ROI_HEADS", "RETINANET")


def load_config(config_file: str = "", opts: Sequence[str] | None = None) -> CfgNode:
    """Read a configuration: Detectron2's defaults and ours, then the file with its ``_BASE_``, then the options.

    Nothing but these files is looked at, and nothing changes but what is returned: see `prepare_data`.

    Args:
        config_file: Path of a YAML file; "" for none.
        opts: ``[KEY, value, KEY, value, ...]``, values as Python literals or plain strings.

    Returns:
        The configuration, not frozen.

    Raises:
        UserError: For a missing or malformed file, an unknown key, a value of the wrong type, a component that does
            not exist, numbers that do not fit each other. The text says what was meant.
    """
    cfg = _merged(_defaults(), config_file, opts)
    known_device(cfg.MODEL.DEVICE)
    check_names(cfg)
    check_numbers(cfg)
    return cfg


def prepare_data(
    cfg: CfgNode, config_file: str = "", opts: Sequence[str] | None = None, *, train: bool = True
) -> CfgNode:
    """Register and check the data sets of DATASETS.COCO_FORMAT and VOC_FORMAT in this process.

    A copy of what had to be mended is written into OUTPUT_DIR. A number of classes that neither the file nor the
    options name is taken from the data.

    Args:
        cfg: As from `load_config`, not frozen; changed in place.
        config_file, opts: What it was loaded from.
        train: Whether there is training; else DATASETS.TRAIN is not looked at, and may be gone.

    Returns:
        ``cfg``.

    Raises:
        UserError: For a data set that does not exist or cannot be used, a number of classes that contradicts the data.
    """
    register_from_config(cfg, train=train)
    check_data_names(cfg, train=train)
    _settle_num_classes(cfg, class_names(cfg, train=train), num_classes_left_open(config_file, opts))
    return cfg


def load_prepared(config_file: str = "", opts: Sequence[str] | None = None, *, train: bool = True) -> CfgNode:
    """`load_config` and `prepare_data` in one, for programs that train or evaluate."""
    return prepare_data(load_config(config_file, opts), config_file, opts, train=train)


def num_classes_left_open(config_file: str = "", opts: Sequence[str] | None = None) -> list[str]:
    """Sections of MODEL whose NUM_CLASSES neither the file nor the options name; arguments as in `load_config`."""
    probe = _defaults()
    for section in WITH_CLASSES:
        probe.MODEL[section].NUM_CLASSES = _LEFT_OPEN
    with _said_once():
        probe = _merged(probe, config_file, opts)
    return [section for section in WITH_CLASSES if probe.MODEL[section].NUM_CLASSES == _LEFT_OPEN]


def _defaults() -> CfgNode:
    cfg = get_cfg()
    add_fpn_d2_config(cfg)
    return cfg


def _merged(cfg: CfgNode, config_file: str, opts: Sequence[str] | None) -> CfgNode:
    if config_file:
        _merge_file(cfg, config_file)
    _merge_options(cfg, [str(o) for o in opts or ()])
    return cfg


def _merge_file(cfg: CfgNode, path: str) -> None:
    try:
        merge_config_file(cfg, path)
    except UserError:
        raise
    except (KeyError, ValueError, AssertionError) as error:
        raise UserError(f"{path} (or its _BASE_): {_explain(cfg, error)}") from None


def _merge_options(cfg: CfgNode, opts: list[str]) -> None:
    switch = next((o for o in opts if o.startswith("--")), None)
    if switch:
        raise UserError(f"{switch} stands among the KEY VALUE pairs: put it before them")
    if len(opts) % 2:
        hint = " (a space between KEY and VALUE, no =)" if any("=" in o for o in opts[::2]) else ""
        raise UserError(f"options are KEY VALUE pairs{hint}, but {opts[-1]!r} is left without a partner: {opts}")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        if not _has_key(cfg, key) and not cfg.key_is_renamed(key) and not cfg.key_is_deprecated(key):
            raise UserError(_unknown_key(cfg, key))
        check_value(key, value)
        try:
            cfg.merge_from_list([key, value])
        except (KeyError, ValueError) as error:
            raise UserError(_explain(cfg, error)) from None


def _has_key(cfg: CfgNode, key: str) -> bool:
    node = cfg
    for part in key.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            return False
        node = node[part]
    return True


def _explain(cfg: CfgNode, error: Exception) -> str:
    """Put what yacs says about an unknown key or a wrong type into words for the user."""
    text = str(error.args[0]) if error.args else str(error)
    unknown = re.match(r"Non-existent (?:config )?key: (\S+)", text)
    if unknown:
        return _unknown_key(cfg, unknown[1])
    mismatch = re.match(r"Type mismatch .* with values \(.* vs\. (.*)\) for config key: (\S+)$", text, re.DOTALL)
    if mismatch and _has_key(cfg, mismatch[2]):  # there may be none where the file is of an older version
        return _wrong_type(cfg, mismatch[2], mismatch[1])
    return text


def _unknown_key(cfg: CfgNode, key: str) -> str:
    return f"there is no key {key}{did_you_mean(key, _all_keys(cfg))}"


def _all_keys(cfg: CfgNode, prefix: str = "") -> list[str]:
    keys = []
    for name, value in cfg.items():
        keys.append(prefix + name)
        if isinstance(value, CfgNode):
            keys += _all_keys(value, f"{prefix}{name}.")
    return keys


def _wrong_type(cfg: CfgNode, key: str, given: str) -> str:
    default = cfg
    for part in key.split("."):
        default = default[part]
    if isinstance(default, CfgNode):
        return f"{key} is a section with the keys {', '.join(sorted(default))}; it cannot be set to {given}"
    expected = f"{key} must be of type {type(default).__name__}, as {default!r} is"
    try:
        value = ast.literal_eval(given)
    except (ValueError, SyntaxError):
        value = given
    if isinstance(default, float) and type(value) is int and abs(value) < 2**53:
        return f"{expected}, not {given}: write {float(value)}"
    if isinstance(default, (tuple, list)) and isinstance(value, (str, int, float)):
        return f"{expected}, not {given}: write ({value!r},)"
    return f"{expected}, not {given}"


@contextlib.contextmanager
def _said_once() -> Iterator[None]:
    """Keep Detectron2 from saying a second time what it says about a file that it reads a second time."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _settle_num_classes(cfg: CfgNode, names: list[str], left_open: list[str]) -> None:
    """Take the number of classes from the data where it was left open; refuse one that contradicts the data."""
    if not names:  # no data, or nothing but stuff to segment
        return
    used = {"GeneralizedRCNN": "ROI_HEADS", "PanopticFPN": "ROI_HEADS"}
    used |= dict.fromkeys(("RetinaNet", "FPNRetinaNet", "TorchvisionRetinaNet"), "RETINANET")
    for section in WITH_CLASSES:
        value = cfg.MODEL[section].NUM_CLASSES
        if section in left_open:
            cfg.MODEL[section].NUM_CLASSES = len(names)
        elif value != len(names) and used.get(cfg.MODEL.META_ARCHITECTURE) == section:
            shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise UserError(
                f"MODEL.{section}.NUM_CLASSES is {value}, but the data has {len(names)} classes ({shown}): "
                f"set it to {len(names)}, or drop the key and it will be taken from the data"
            )
