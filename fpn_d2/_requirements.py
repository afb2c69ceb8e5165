"""The check at the first use of fpn_d2: pip installs none of these with us (see setup.py), so they are looked for."""

import importlib
import os
import re

from fpn_d2.errors import did_you_mean

# (name to import, name to print, lowest version, what to do)
REQUIREMENTS = (
    ("torch", "torch", (2, 0), "install a newer torch"),
    ("torchvision", "torchvision", (0, 15), "install the torchvision release that goes with your torch"),
    (
        "detectron2",
        "Detectron2",
        (0, 6),
        "see https://detectron2.readthedocs.io/tutorials/install.html",
    ),
)
# Only for images and pictures: a model is built, trained and run without it.
OPENCV = (("cv2", "OpenCV", (4, 0), "pip install opencv-python-headless"),)
# Names a module that Detectron2 imports when it is imported itself.
ENV_MODULE, _OURS = "DETECTRON2_ENV_MODULE", "fpn_d2.env_module"


class RequirementError(ImportError):
    """A package that fpn_d2 needs is missing, broken or too old: one sentence says what to do."""


def check(requirements: tuple = REQUIREMENTS) -> None:
    """Import each of ``requirements`` and compare its version; all but the import itself costs nothing.

    Raises:
        RequirementError: one is missing, broken or too old; one sentence says which, what was found and what to do.
    """
    for module_name, name, lowest, advice in requirements:
        needed = f"fpn_d2 needs {name} {'.'.join(map(str, lowest))} or newer"
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # a torchvision that does not fit its torch raises a RuntimeError
            if isinstance(error, ModuleNotFoundError) and error.name == module_name:
                missing = "run `fpn-d2 install-detectron2`, which installs what is missing, or see pytorch.org and "
                missing += "https://detectron2.readthedocs.io/tutorials/install.html"
                raise RequirementError(f"{needed}, found none: {missing}") from None
            if module_name == "detectron2" and _of_the_variable(error):
                named = os.environ[ENV_MODULE]
                hint = did_you_mean(named, [_OURS])
                raise RequirementError(f"{ENV_MODULE} names {named!r}, which cannot be used{hint}: {error}") from None
            raise RequirementError(f"{needed}, found one that cannot be imported ({error}): {advice}") from error
        # None while Detectron2 is itself being imported and has called DETECTRON2_ENV_MODULE: it says so at its end.
        version = getattr(module, "__version__", None)
        numbers = re.match(r"(\d+)\.(\d+)", str(version))
        if numbers and tuple(map(int, numbers.groups())) < lowest:
            raise RequirementError(f"{needed}, found {version}: {advice}")


def _of_the_variable(error: Exception) -> bool:
    """Whether Detectron2 could not be imported since the environment variable names a module that does not exist."""
    named = os.environ.get(ENV_MODULE, "")
    if isinstance(error, ModuleNotFoundError):
        return bool(error.name) and f"{named}.".startswith(f"{error.name}.")
    return bool(named) and (isinstance(error, FileNotFoundError) or "setup_environment" in str(error))
