"""Finding files and folders that a user names, and writing files whole."""

import contextlib
import difflib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fpn_d2.errors import UserError

UNFINISHED = ".unfinished"  # at the end of the name of a file that is being written


def locate(path: str | os.PathLike, what: str, *, folder: bool = False) -> Path:
    """Find a file or folder that a user named.

    A relative path is looked for in the current directory first, and then in ``$DETECTRON2_DATASETS`` (by default
    ``datasets``), where Detectron2 looks for its own data sets.

    Args:
        path: The path as the user gave it; ``~`` is the home directory.
        what: What it is, for the message: "the annotations of data set 'cells'".
        folder: Whether a folder is expected, not a file.

    Returns:
        The absolute path.

    Raises:
        UserError: If there is no such file or folder. The message names all places that were looked at, and
            an existing name that is close, if there is one. If ``path`` is not a path.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise UserError(f"Expected the path of {what} as text, got {path!r}.")
    named = Path(path).expanduser()
    places = [Path(os.path.abspath(named))]
    if not named.is_absolute():
        root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
        places.append(Path(os.path.abspath(root / named)))
    for place in places:
        if place.is_dir() if folder else place.is_file():
            return place

    kind = "folder" if folder else "file"
    message = f"There is no {kind} for {what}: looked for " + " and ".join(str(place) for place in places) + "."
    close = [found for place in places for found in _close_names(place, folder)]
    if close:
        message += f" Did you mean {close[0]}?"
    raise UserError(message)


def _close_names(place: Path, folder: bool) -> list[Path]:
    if not place.parent.is_dir():
        return _close_names(place.parent, folder=True) if place.parent != place else []
    # Unlike what os.scandir gives, these answer for links in a circle too.
    is_one = os.path.isdir if folder else os.path.isfile
    names = [name for name in os.listdir(place.parent) if is_one(place.parent / name)]
    return [place.parent / name for name in difflib.get_close_matches(place.name, names, n=1)]


def writable_folder(folder: str | os.PathLike) -> Path:
    """Check that files can be written in a folder that a user named, and make it if it is not there.

    Raises:
        UserError: Says why not.
    """
    folder = Path(folder).expanduser()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as f:
            f.write(b"x")
            f.flush()
    return folder


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Within this context a file or folder that a user named is written.

    Raises:
        UserError: The system did not let it be; says why not.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {os.path.abspath(path)}: {error.strerror or error}") from error


def write_atomically(path: str, text: str) -> None:
    """Write a small text file such that readers see the old text or the new, never a part, also after a power cut.

    Raises:
        UserError: It cannot be written.
    """
    with writing(path):
        with open(path + UNFINISHED, "w") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + UNFINISHED, path)
    sync_folder(os.path.dirname(path))


def sync_folder(folder: str) -> None:
    """Have the names in ``folder`` written to the disk, on systems that can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
