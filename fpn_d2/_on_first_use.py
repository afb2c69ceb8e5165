"""What is heavy is imported at its first use, and registered with Detectron2 before anybody can miss it.

`import fpn_d2` itself takes milliseconds and needs no other package, so that ``fpn-d2 --help`` and what installs the
other packages do the same. All components are imported, which registers them, as soon as

- a module of fpn_d2 is imported that needs them: always in the same order, whichever it is;
- ``detectron2.modeling`` is imported: it holds the registries, so nobody can have looked into them before.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from fpn_d2 import _requirements

_REGISTRIES = "detectron2.modeling"
# Modules that know the standard library alone, or import what they need by themselves.
_LIGHT = (
    *("_on_first_use", "_requirements", "cli", "config_names", "env_module", "errors", "files", "huge_pages", "set_up"),
)


class _Finder:
    """Stands before Python's own finders of modules, and finds nothing itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, rest = name.partition(".")
        if package == "fpn_d2" and rest.split(".")[0] not in _LIGHT:
            register()
        return _followed_by_us(name, path, target) if name == _REGISTRIES else None


_finder = _Finder()


def register() -> None:
    """Import every component, once.

    Raises:
        ImportError: a package that they need is missing, broken or too old; one sentence says which and what to do.
    """
    if _finder not in sys.meta_path:
        return
    sys.meta_path.remove(_finder)
    try:
        _requirements.check()
        importlib.import_module("fpn_d2.modeling")
    except BaseException:
        sys.meta_path.insert(0, _finder)
        raise


def watch() -> None:
    """Have `register` called when its time comes; now, if Detectron2's registries are there already."""
    sys.meta_path.insert(0, _finder)
    if _REGISTRIES in sys.modules:
        register()


def _followed_by_us(name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    """What the other finders say, with `register` called when the module has been run."""
    specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not _finder)
    spec = next(filter(None, specs), None)
    if spec is None or spec.loader is None:
        return spec
    loader = spec.loader
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        if loader.__dict__.get("exec_module") is exec_module:
            del loader.exec_module  # it is as it was
        run(module)
        register()

    loader.exec_module = exec_module
    return spec
