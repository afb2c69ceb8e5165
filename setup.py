"""Metadata of fpn_d2.

torch, torchvision, Detectron2 and OpenCV are not in ``install_requires``: each comes in builds that pip cannot tell
apart (CPU or CUDA, compiled or not, with windows or headless), so that requiring one would replace what a user has
chosen. ``fpn_d2/_requirements.py`` checks them at import; ``make setup`` installs them where they are missing.
"""

from setuptools import find_packages, setup

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
    # All of these are requirements of Detectron2 too, with no narrower bounds here: nothing of it gets replaced.
    install_requires=["numpy", "Pillow>=7.1", "matplotlib", "pycocotools>=2.0.2", "tqdm>4.29.0"],
    extras_require={
        # Only where cv2 cannot be imported: opencv-python and opencv-python-headless overwrite each other.
        "opencv": ["opencv-python-headless"],
        # Bottom-up pathways of timm. It requires torch and torchvision of any version: those that are there will do.
        "timm": ["timm>=1.0.9"],
        # A C++ compiler where there is none: pooling and convolutions on a CPU are compiled at first use.
        "compiler": ["ziglang"],
        # The same COCO figures, several times sooner; used as soon as it is there.
        "fast-eval": ["faster-coco-eval>=1.6"],
        # What writes ONNX files, and what `fpn-d2 export` runs them with.
        "export": ["onnx", "onnxscript", "onnxruntime", "openvino"],
        # The page and the API of `fpn-d2 serve`.
        "serve": ["starlette", "uvicorn"],
        # What `fpn-d2 export --to openvino-int8` quantises with.
        "int8": ["onnx", "onnxscript", "openvino", "nncf"],
        # shapely: fvcore crops polygons with it.
        "test": [
            "faster-coco-eval>=1.6",
            "hypothesis",
            "import-linter>=2.6",
            "pytest>=7",
            "pytest-xdist>=3.2",
            "ruff",
            "shapely",
            "starlette",
            "timm>=1.0.9",
            "uvicorn",
        ],
    },
    entry_points={"console_scripts": ["fpn-d2=fpn_d2.cli:main"]},
)
