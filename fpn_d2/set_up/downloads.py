"""What pip would download, and how large that is: asked before anything of it is downloaded."""

import contextlib
import json
import os
import re
import shutil
import ssl
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

# From this release on, a dry run reads what packages need from the index, where it can, and downloads no wheel.
_PIP = (23, 3)
_SECONDS = 300
_SECONDS_FOR_A_SIZE = 10


class Downloads:
    """Packages by name, each with its size in bytes; None where it is not known, 0 for what is on this machine."""

    def __init__(self, sizes: dict[str, int | None]):
        self.sizes = sizes

    def text(self) -> str:
        """In words: how many, how large, the largest ones."""
        wanted = {name: size for name, size in self.sizes.items() if size != 0}
        known = {name: size for name, size in wanted.items() if size is not None}
        packages = f"{len(wanted)} package{'s' if len(wanted) != 1 else ''}"
        if not wanted:
            return "nothing to download"
        if not known:
            return f"to download: {packages} of unknown size"
        least = "" if len(known) == len(wanted) else "at least "
        largest = sorted(known, key=known.get, reverse=True)[:3]
        names = ", ".join(f"{name} {size_text(known[name])}" for name in largest)
        return f"to download: {packages}, {least}{size_text(sum(known.values()))} ({names})"


def size_text(size: int) -> str:
    """A number of bytes as pip writes it: 1.2 GB, 34 MB, 56 kB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}" if size < 10 * unit else f"{size / unit:.0f} {name}"
    return f"{size} bytes"


def plan(python: Path, arguments: Sequence[str], environment: dict[str, str]) -> Downloads | None:
    """What ``python -m pip install ARGUMENTS`` would install from elsewhere.

    Args:
        python: interpreter of the environment.
        arguments: of ``pip install``.
        environment: of the process; one whose pip is too old gets another pip, for this question alone.

    Returns:
        The packages; None where that cannot be found out, as without a network, or where nothing fits.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        with _able_pip(python, environment, folder) as able:
            if able is None:
                return None
            command = [str(python), "-m", "pip", "install", "--dry-run", "--quiet", "--report", str(report)]
            if _status([*command, *arguments], able) or not report.is_file():
                return None
        content = json.loads(report.read_text(encoding="utf-8"))
    urls = {one["metadata"]["name"]: one["download_info"]["url"] for one in content.get("install", ())}
    with ThreadPoolExecutor(8) as pool:
        return Downloads(dict(zip(urls, pool.map(size_of, urls.values()), strict=True)))


def size_of(url: str) -> int | None:
    """Size in bytes of what is at an address; None if it does not say, 0 where it is on this machine already."""
    if urlsplit(url).scheme == "file":
        return 0
    certificates = next((os.environ[name] for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE") if os.environ.get(name)), None)
    try:
        context = ssl.create_default_context(cafile=certificates)
        asked = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(asked, timeout=_SECONDS_FOR_A_SIZE, context=context) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, ValueError, TypeError):
        return None


@contextlib.contextmanager
def _able_pip(python: Path, environment: dict[str, str], folder: str) -> Iterator[dict[str, str] | None]:
    """The environment in which ``python -m pip`` is new enough; None if there is none."""
    asked = subprocess.run(
        [str(python), "-m", "pip", "--version"], env=environment, capture_output=True, text=True, check=False
    )
    version = re.match(r"pip (\d+)\.(\d+)", asked.stdout)
    if version and tuple(map(int, version.groups())) >= _PIP:
        yield environment
        return
    newer = Path(folder) / "pip"
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(newer), "pip"]
    if _status(command, environment):
        yield None
        return
    yield {**environment, "PYTHONPATH": os.pathsep.join(filter(None, [str(newer), environment.get("PYTHONPATH")]))}
    shutil.rmtree(newer, ignore_errors=True)


def _status(command: list[str], environment: dict[str, str]) -> int:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        return subprocess.run(command, env=environment, timeout=_SECONDS, check=False, **quiet).returncode
    except subprocess.TimeoutExpired:
        return 1
