"""Build a pure-Python wheel of Detectron2 v0.6 that runs on today's torch, numpy, Pillow and setuptools.

Detectron2 has no release on PyPI under its own name. The source distribution ``pb1-detectron2==0.6`` holds
v0.6's Python files byte for byte, together with the model zoo's configs and without the C++ sources, so that
``pip install`` of it fails. This module downloads it (pip checks the hash), applies ``MENDS`` below and packs
what remains as the wheel ``detectron2-0.6-py3-none-any.whl``. Only the standard library and pip are needed.

    python detectron2_wheel.py OUTPUT_DIR
"""

import base64
import dataclasses
import hashlib
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence

REQUIREMENT = "pb1-detectron2==0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
ROOT = "pb1-detectron2-0.6/"
WHEEL_NAME = "detectron2-0.6-py3-none-any.whl"
INFO = "detectron2-0.6.dist-info/"

# setup.py of v0.6 installs these three projects below detectron2.projects; so do we.
PACKAGES = {
    "detectron2/": "detectron2/",
    "projects/PointRend/point_rend/": "detectron2/projects/point_rend/",
    "projects/DeepLab/deeplab/": "detectron2/projects/deeplab/",
    "projects/Panoptic-DeepLab/panoptic_deeplab/": "detectron2/projects/panoptic_deeplab/",
}

# Not part of the package, but of use to whoever has only the wheel: `tools/train_net.py` as it was.
BESIDE = ("LICENSE", "tools/train_net.py")

# v0.6's own requirements less black (a pin that conflicts with everything), future and pydot (caffe2 only).
REQUIRES = [
    "Pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7,<0.1.10",
    "omegaconf>=2.1",
    "hydra-core>=1.1",
]

METADATA = """Metadata-Version: 2.1
Name: detectron2
Version: 0.6
Summary: Detectron2 v0.6, Python part only: no compiled extension. Mended for current dependencies.
Home-page: https://github.com/facebookresearch/detectron2
License: Apache-2.0
Requires-Python: >=3.7
"""

WHEEL = """Wheel-Version: 1.0
Generator: {generator}
Root-Is-Purelib: true
Tag: py3-none-any
"""

# detectron2.layers imports detectron2._C when it is itself imported, so the module has to exist.
MISSING_EXTENSION = '''"""Stands where the compiled extension of Detectron2 would be; this build has none."""


# Detectron2's environment report asks for these three.
def get_compiler_version():
    return "none (pure-Python build)"


def get_cuda_version():
    return "none (pure-Python build)"


def has_cuda():
    return False


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def needs_the_extension(*args, **kwargs):
        raise RuntimeError(
            f"detectron2._C.{name} was called, but this Detectron2 is a pure-Python build without the compiled "
            "extension that deformable convolutions and rotated boxes need. To get it, build Detectron2 from "
            "source with a C++ compiler (and the CUDA toolkit for GPUs): "
            "https://detectron2.readthedocs.io/tutorials/install.html"
        )

    return needs_the_extension
'''


@dataclasses.dataclass(frozen=True)
class Mend:
    """``count`` occurrences of ``old`` in ``path`` become ``new``; any other number of them is an error."""

    path: str
    old: str
    new: str
    count: int
    reason: str


NUMPY = "numpy 1.24 removed the aliases np.bool, np.int and np.float of Python's own types"
SETUPTOOLS = "setuptools 82 removed pkg_resources; importlib has what is needed here since Python 3.9"
CAFFE2 = "torch 2.4 removed caffe2; without it only the TorchScript part of detectron2.export can be imported"
EXTENSION = "needs the compiled extension, which this build does not have"
CPU_DEFORM = "say that the compiled extension is missing before saying that it would not run on a CPU"

MENDS = [
    Mend("detectron2/data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR", 1,
         "Pillow 10 removed the alias Image.LINEAR of Image.BILINEAR"),
    Mend("detectron2/data/build.py", "dtype=np.int", "dtype=int", 2, NUMPY),
    Mend("detectron2/evaluation/pascal_voc_evaluation.py", "np.bool)", "bool)", 2, NUMPY),
    Mend("detectron2/evaluation/sem_seg_evaluation.py", "np.int)", "int)", 2, NUMPY),
    Mend("detectron2/evaluation/sem_seg_evaluation.py", "np.float)", "float)", 5, NUMPY),
    Mend("detectron2/structures/masks.py", "np.bool)", "bool)", 3, NUMPY),
    Mend("detectron2/utils/visualizer.py", "np.bool)", "bool)", 3, NUMPY),
    Mend("detectron2/utils/video_visualizer.py", "np.bool)", "bool)", 1, NUMPY),
    Mend("detectron2/model_zoo/model_zoo.py", "import pkg_resources\n", "import importlib.resources\n", 1, SETUPTOOLS),
    Mend("detectron2/model_zoo/model_zoo.py",
         'pkg_resources.resource_filename(\n'
         '        "detectron2.model_zoo", os.path.join("configs", config_path)\n    )',
         'str(importlib.resources.files("detectron2.model_zoo").joinpath("configs", config_path))', 1, SETUPTOOLS),
    Mend("detectron2/export/__init__.py", "from .api import *\n",
         "try:\n    from .api import *\nexcept ImportError:  # caffe2 is not there\n    pass\n", 1, CAFFE2),
    Mend("detectron2/evaluation/fast_eval_api.py", "from detectron2 import _C\n",
         'raise ImportError("the C++ COCO evaluation needs the compiled extension of Detectron2")\n', 1, EXTENSION),
    Mend("detectron2/evaluation/coco_evaluation.py",
         "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
         "try:\n    from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
         "except ImportError:  # as Detectron2's main branch does\n    COCOeval_opt = COCOeval\n", 1, EXTENSION),
    Mend("detectron2/layers/nms.py", "    return torch.ops.detectron2.nms_rotated(",
         "    from detectron2 import _C\n\n    return _C.nms_rotated(", 1, EXTENSION),
    Mend("detectron2/layers/deform_conv.py",
         'raise NotImplementedError("Deformable Conv is not supported on CPUs!")',
         "_C.deformable_convolution()", 3, CPU_DEFORM),
    Mend("detectron2/layers/deform_conv.py",
         'raise NotImplementedError(\n'
         '                    "Deformable Conv with deformable_groups != 1 is not supported on CPUs!"\n'
         '                )',
         "_C.deformable_convolution()", 1, CPU_DEFORM),
]  # fmt: skip


class WheelError(Exception):
    """The wheel could not be built; the message is one sentence for the user."""


# A build back-end that only names the package. pip asks for metadata before it hands an sdist over, and v0.6's
# own setup.py cannot give it without torch and the C++ sources.
BACKEND = """
import os


class __legacy__:
    @staticmethod
    def get_requires_for_build_wheel(config_settings=None):
        return []

    @staticmethod
    def prepare_metadata_for_build_wheel(directory, config_settings=None):
        name = "pb1_detectron2-0.6.dist-info"
        os.makedirs(os.path.join(directory, name))
        with open(os.path.join(directory, name, "METADATA"), "w") as f:
            f.write("Metadata-Version: 2.1\\nName: pb1-detectron2\\nVersion: 0.6\\n")
        return name
"""


def download(folder: pathlib.Path) -> pathlib.Path:
    """Let pip download the source distribution into ``folder``, checked against ``SHA256``.

    Raises:
        WheelError: pip could not get it, or got something else.
    """
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(BACKEND)
    pins = folder / "pins.txt"
    pins.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--no-binary=:all:", "--no-build-isolation", "--use-pep517", "--requirement", str(pins)]
    environment = {**os.environ, "PYTHONPATH": str(backend.parent)}
    result = subprocess.run(
        [*command, "--dest", str(folder)], env=environment, text=True, capture_output=True, check=False
    )
    found = list(folder.glob("*.tar.gz"))
    if result.returncode or len(found) != 1:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        raise WheelError(f"pip could not download {REQUIREMENT}: {lines[-1].removeprefix('ERROR: ')}")
    return found[0]


def mended_files(sdist: pathlib.Path, sha256: str = SHA256, mends: Sequence[Mend] = MENDS) -> dict:
    """Return ``{path in the wheel: bytes}`` of the sources in ``sdist`` with every mend applied.

    Args:
        sdist: the source distribution, a .tar.gz file.
        sha256: what its bytes must hash to, in hexadecimal.
        mends: the changes to make, in this order.

    Raises:
        WheelError: the sdist is not the expected one, or a text to mend is not there as often as expected.
    """
    actual = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if actual != sha256:
        raise WheelError(f"{sdist} has sha256 {actual}, expected {sha256}; delete it and try again")
    files = {}
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            name = member.name.removeprefix(ROOT)
            if name in BESIDE:
                files[INFO + name] = archive.extractfile(member).read()
            for source, target in PACKAGES.items():
                if member.isfile() and name.startswith(source):
                    files[target + name.removeprefix(source)] = archive.extractfile(member).read()
    for mend in mends:
        text = files.get(mend.path, b"").decode()
        if text.count(mend.old) != mend.count:
            raise WheelError(
                f"{mend.path}: expected {mend.old!r} {mend.count} times, found it {text.count(mend.old)} times "
                f"(the mend: {mend.reason})"
            )
        files[mend.path] = text.replace(mend.old, mend.new).encode()
    files["detectron2/_C.py"] = MISSING_EXTENSION.encode()
    return files


def write_wheel(files: dict, path: pathlib.Path) -> None:
    """Write ``files`` as the wheel ``path``, through a temporary file so that it is whole or not there."""
    requires = "".join(f"Requires-Dist: {line}\n" for line in REQUIRES)
    wheel_info = WHEEL.format(generator=generator())
    files = {**files, INFO + "METADATA": (METADATA + requires).encode(), INFO + "WHEEL": wheel_info.encode()}
    record = []
    part = path.with_suffix(".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in sorted(files.items()):
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record.append(f"{name},sha256={digest},{len(data)}\n")
            # A fixed date: the same sources give the same wheel.
            wheel.writestr(zipfile.ZipInfo(name, (2021, 11, 15, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
        record.append(f"{INFO}RECORD,,\n")
        wheel.writestr(zipfile.ZipInfo(INFO + "RECORD", (2021, 11, 15, 0, 0, 0)), "".join(record))
    part.replace(path)


def generator() -> str:
    """Return what the wheel names as its maker: it changes with this file, so an older build can be told."""
    digest = hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()
    return f"fpn_d2 bootstrap {digest[:12]}"


def build(output_dir: pathlib.Path) -> pathlib.Path:
    """Build the wheel in ``output_dir`` and return its path.

    Raises:
        WheelError: see ``download`` and ``mended_files``.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    wheel = output_dir / WHEEL_NAME
    with tempfile.TemporaryDirectory() as folder:
        write_wheel(mended_files(download(pathlib.Path(folder))), wheel)
    return wheel


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python detectron2_wheel.py OUTPUT_DIR")
    try:
        print(build(pathlib.Path(sys.argv[1])))
    except WheelError as error:
        sys.exit(f"error: {error}")
