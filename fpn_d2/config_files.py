"""Configuration files read as data: YAML without Python objects, with Detectron2's ``_BASE_``.

Detectron2's own reader falls back to ``yaml.unsafe_load``, with which a file runs whatever it names. Of what that one
adds, two things are in Detectron2's own configs and stay: tuples, and sums in Python's notation, worked out by
`arithmetic`. Anchors and aliases stay too, as long as they unfold into no more than a configuration holds.
"""

import ast
import copy
import os
from typing import Any

import yaml
from detectron2.config import CfgNode, downgrade_config, upgrade_config
from detectron2.config.compat import guess_version
from detectron2.utils.file_io import PathManager

from fpn_d2.arithmetic import arithmetic
from fpn_d2.config_names import find_config, own_config
from fpn_d2.errors import UserError, not_found

_LARGEST_FILE = 2**20  # bytes; a configuration of all keys has 12 thousand
_LONGEST_TEXT = 20_000  # characters that Python may be asked to read as a value; more can overflow its stack
_MOST_VALUES = 100_000
_DEEPEST = 40
_MOST_BASES = 50
_BASE = "_BASE_"
_SCALARS = (str, int, float, bool, type(None))


def merge_config_file(cfg: CfgNode, path: str) -> None:
    """``cfg.merge_from_file(path)``, but safely: older versions are brought up to date as there.

    Args:
        cfg: Changed in place.
        path: A file or a name, as in `find_config`, or an address that Detectron2's PathManager knows.

    Raises:
        UserError: As `read_config`.
        KeyError, ValueError, AssertionError: As yacs for unknown keys and wrong types.
    """
    loaded = CfgNode(read_config(path))
    version = loaded.get("VERSION")
    if version is None:
        # It looks into these two sections, and takes for granted that they are some.
        sections = all(isinstance(loaded.get(name, cfg[name]), CfgNode) for name in ("MODEL", "TEST"))
        version = guess_version(loaded, path) if sections and "MODEL" in loaded else cfg.VERSION
    if type(version) is not int or not 1 <= version <= cfg.VERSION:
        raise UserError(f"{path}: VERSION is {version!r:.100}; expected a whole number from 1 to {cfg.VERSION}")
    loaded.VERSION = version  # also where it says null
    if version == cfg.VERSION:
        cfg.merge_from_other_cfg(loaded)
        return
    old = downgrade_config(cfg, to_version=version)
    old.merge_from_other_cfg(loaded)
    new = upgrade_config(old)
    cfg.clear()
    cfg.update(new)


def read_config(path: str) -> dict[str, Any]:
    """Read a YAML file and those that it names under ``_BASE_``, one path or a list.

    A base is relative to the file that names it, or else the name of a configuration of ours.

    Returns:
        Dictionaries by section down to numbers, text, lists and tuples. What stands in a file wins over its bases, and
        a later base over an earlier one.

    Raises:
        UserError: A file is missing or no YAML, its bases go round in a circle, or it asks for more than data.
    """
    return _read(path if "://" in path else str(find_config(path)), (), {})


def _read(path: str, on_the_way: tuple[str, ...], known: dict[str, dict]) -> dict[str, Any]:
    if "://" not in path and not os.path.isfile(path):
        raise UserError(_line(f"a {_BASE} of {on_the_way[-1]} does not exist: {not_found(path)}"))
    real = path if "://" in path else os.path.realpath(path)
    if real in on_the_way:
        circle = " -> ".join((*on_the_way[on_the_way.index(real) :], real))
        raise UserError(f"{_BASE} goes round in a circle, {circle}: one of them must have none")
    if real not in known:
        if len(known) >= _MOST_BASES:
            raise UserError(f"{path} stands on more than {_MOST_BASES} files")
        known[real] = {}
        known[real] = _with_bases(path, (*on_the_way, real), known)
    return copy.deepcopy(known[real])


def _with_bases(path: str, on_the_way: tuple[str, ...], known: dict[str, dict]) -> dict[str, Any]:
    own = parse_config(_content(path), path)
    bases = own.pop(_BASE, [])
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list | tuple) else [bases]:
        if not isinstance(base, str) or not base:
            raise UserError(f"{path}: {_BASE} is {base!r:.100}; expected the path of a file")
        base = os.path.expanduser(base)
        if "://" not in base:
            beside = os.path.join(os.path.dirname(path), base)
            base = beside if os.path.isfile(beside) else own_config(base) or beside
        _lay_over(merged, _read(base, on_the_way, known), path)
    _lay_over(merged, own, path)
    return merged


def _lay_over(below: dict, above: dict, path: str) -> None:
    for key, value in above.items():
        if isinstance(value, dict) and key in below:
            if not isinstance(below[key], dict):
                raise UserError(f"{path}: {key:.100} is a section, and a single value in its {_BASE}")
            _lay_over(below[key], value, path)
        else:
            below[key] = value


def parse_config(content: str | bytes, path: str) -> dict[str, Any]:
    """As `read_config`, of a text by itself, which came from ``path``; it has no bases."""
    if not isinstance(content, str | bytes) or len(content) > _LARGEST_FILE:
        raise UserError(f"{path} is larger than {_LARGEST_FILE // 1024} KiB, or no text, and no configuration")
    try:
        loader = _Loader(content)
        try:
            node = loader.get_single_node()
            if node is not None:
                _measure(node, {}, frozenset())
            value = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
        if not isinstance(value, dict):
            raise UserError("it holds no KEY: value pairs")
        _check(value)
        return value
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {_line(error)}") from None
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        # A date that does not exist, a number of ten thousand digits, !!map for a number.
        raise UserError(f"{path} holds a value that is none: {_line(error)}") from None


def _content(path: str) -> bytes:
    try:
        with PathManager.open(path, "rb") as file:
            return file.read(_LARGEST_FILE + 1)
    except Exception as error:  # whatever the handler of that kind of address raises
        raise UserError(f"the configuration {path} cannot be read: {_line(error)}") from error


def _line(error: Exception | str, most: int = 500) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    return text[:most] + ("..." if len(text) > most else "")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which takes tuples and sums too, and stops at depths that it would not survive."""

    def fetch_flow_collection_start(self, token_class: type) -> None:
        self._check_depth()
        super().fetch_flow_collection_start(token_class)

    def add_indent(self, column: int) -> bool:
        self._check_depth()
        return super().add_indent(column)

    def _check_depth(self) -> None:
        # The scanner takes time that grows with the square of the depth, and the composer calls itself.
        if self.flow_level + len(self.indents) > _DEEPEST:
            raise UserError(f"it is nested more than {_DEEPEST} deep")


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], on_the_way: frozenset[int]) -> tuple[int, int]:
    """Number of values that ``node`` unfolds into, each alias being counted where it stands, and its depth."""
    if id(node) in on_the_way:
        raise UserError("an alias stands for something that it is a part of")
    if id(node) not in known:
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
        below = [_measure(part, known, on_the_way | {id(node)}) for part in parts]
        count, depth = 1 + sum(n for n, _ in below), 1 + max((n for _, n in below), default=0)
        if count > _MOST_VALUES:
            raise UserError(f"its aliases unfold into more than {_MOST_VALUES} values")
        if depth > _DEEPEST:
            raise UserError(f"it is nested more than {_DEEPEST} deep")
        known[id(node)] = count, depth
    return known[id(node)]


def _check(value: Any, key: str = "its first level") -> None:
    if isinstance(value, dict):
        for name, part in value.items():
            if not isinstance(name, str):
                raise UserError(f"{key} has the key {name!r:.100}, which is no text: put quotes round it")
            if not name.isprintable() or len(name) > 200:
                raise UserError(f"{key} has the key {name!r:.100}, which is no name")
            _check(part, name)
    elif isinstance(value, list | tuple):
        for part in value:
            _check(part, key)
    elif not isinstance(value, _SCALARS):
        raise UserError(f"{key} is a {type(value).__name__}, and not a number, text or a list: put quotes round it")
    elif isinstance(value, str):
        check_value(key, value)


def check_value(key: str, text: str) -> None:
    """Make sure that yacs, which reads each text as a value of Python's, can try so with this one.

    Raises:
        UserError: It is too long, or nested too deep, for Python to read.
    """
    try:
        if len(text) > _LONGEST_TEXT:
            raise MemoryError
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass  # text and nothing else
    except (MemoryError, RecursionError):
        raise UserError(f"{key} is text of {len(text)} characters, too long or nested too deep to be a value") from None
    except TypeError as error:
        raise UserError(f"{key} is {text!r:.100}, which is no value of Python's: {error}") from None


def _construct_tuple(loader: _Loader, node: yaml.Node) -> tuple:
    if not isinstance(node, yaml.SequenceNode):
        raise UserError("a !!python/tuple is no list")
    return tuple(loader.construct_sequence(node, deep=True))


def _construct_sum(loader: _Loader, node: yaml.Node) -> Any:
    arguments = loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else []
    if len(arguments) != 1 or not isinstance(arguments[0], str):
        raise UserError("a !!python/object/apply:eval has not one text to work out")
    return arithmetic(arguments[0])


def _refuse(loader: _Loader, tag: str, node: yaml.Node) -> None:
    raise UserError(
        f"line {node.start_mark.line + 1} asks for Python's {tag!r:.100}, which may run anything; nothing was called. "
        "Of Python's tags only tuples are read, and !!python/object/apply:eval with sums: write the value itself"
    )


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _construct_tuple)
_Loader.add_constructor("tag:yaml.org,2002:python/object/apply:eval", _construct_sum)
_Loader.add_constructor("tag:yaml.org,2002:python/unicode", yaml.SafeLoader.construct_yaml_str)
_Loader.add_multi_constructor("tag:yaml.org,2002:python/", _refuse)
