"""Configurations by name: those that come with fpn_d2, and those of Detectron2's model zoo."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from .errors import UserError, did_you_mean, not_found

_PACKAGE = Path(__file__).resolve().parent
_OURS = "configs/"  # before the name of one of ours, which is then a path in a checkout too


def own_folder() -> Path:
    """Where our configurations are: in an installed package, or at the top level of a checkout.

    Raises:
        UserError: They are in neither place.
    """
    places = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
    for folder in places:
        if (folder / "Base-FPN.yaml").is_file():
            return folder
    looked = " or ".join(map(str, places))
    raise UserError(f"the configurations of fpn_d2 are not in {looked}: install fpn_d2 again")


def zoo_folders() -> list[Path]:
    """Where the model zoo's configs are: in the installed Detectron2, or in the checkout that it is imported from."""
    found = importlib.util.find_spec("detectron2")
    if found is None or not found.submodule_search_locations:
        return []
    package = Path(next(iter(found.submodule_search_locations)))
    return [path for path in (package / "model_zoo" / "configs", package.parent / "configs") if path.is_dir()]


def config_file(name: str) -> str:
    """Path of a configuration that comes with fpn_d2, as Detectron2's ``model_zoo.get_config_file`` is for its own.

    Args:
        name: As "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"; ".yaml" may be left out.

    Raises:
        UserError: There is none of that name; the text names the nearest ones.

    Example:
        >>> cfg.merge_from_file(fpn_d2.config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))
    """
    found = own_config(name)
    if found is None:
        raise UserError(f"fpn_d2 has no configuration {name}{_near(name, [own_folder()])}")
    return found


def own_config(name: str) -> str | None:
    """As `config_file`, but None where there is none of that name."""
    found = _in_folders(name, [own_folder()])
    return None if found is None else str(found)


def find_config(name: str, zoo_first: bool = False) -> Path:
    """The YAML file that ``name`` stands for: a path, or a name of ours, or one in Detectron2's model zoo.

    A name with "configs/" before it is one of ours; one that both have is ours too, unless ``zoo_first``.

    Args:
        name: The path, of which ``~`` is the home directory, or the name, with or without ".yaml".
        zoo_first: Whether a name that both have is Detectron2's.

    Raises:
        UserError: There is no such file; the text names the nearest ones.
    """
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):  # which takes any text
        return path
    folders = [own_folder()]
    if not name.startswith(_OURS):
        folders = [*zoo_folders(), *folders] if zoo_first else [*folders, *zoo_folders()]
    found = _in_folders(name, folders)
    if found is not None:
        return found
    nor = ""
    if not path.is_absolute() and not name.startswith((".", "~")):
        nor = f"; nor has fpn_d2 or Detectron2's model zoo one of that name{_near(name, folders)}"
    raise UserError(f"no configuration file {name}: {not_found(name)}{nor}")


def list_own() -> list[tuple[str, str]]:
    """Name of each of our configurations, without ".yaml", and its title, the first line of the file."""
    folder = own_folder()
    first = {name: (folder / name).read_text(encoding="utf-8").partition("\n")[0] for name in names_in([folder])}
    return [(name.removesuffix(".yaml"), line.lstrip("# ").rstrip(".")) for name, line in first.items()]


def names_in(folders: Sequence[Path]) -> list[str]:
    """Names of the configurations in ``folders``; files that others are based on are not among them."""
    found = {file.relative_to(folder).as_posix() for folder in folders for file in folder.rglob("*.yaml")}
    return sorted(name for name in found if not Path(name).name.startswith("Base-"))


def _in_folders(name: str, folders: Sequence[Path]) -> Path | None:
    bare = _bare(name)
    if not bare or ".." in Path(bare).parts or Path(bare).is_absolute():
        return None
    candidates = [folder / f"{bare}{end}" for folder in folders for end in ("", ".yaml")]
    return next((path for path in candidates if path.suffix == ".yaml" and os.path.isfile(path)), None)


def _near(name: str, folders: Sequence[Path]) -> str:
    known = (known.removesuffix(".yaml") for known in names_in(folders))
    return did_you_mean(_bare(name).removesuffix(".yaml"), known)


def _bare(name: str) -> str:
    return name.removeprefix(_OURS)
