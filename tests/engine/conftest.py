"""Scenes to train on, made once."""

from pathlib import Path

import pytest

from fpn_d2.data.scenes import make_scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Folder with six training scenes and three validation scenes of 64 x 64 pixels."""
    folder = tmp_path_factory.mktemp("engine") / "scenes"
    return make_scenes(
        folder, train=6, val=3, image_size=64, min_size=8, max_objects=3, empty=0.0, seed=3, progress=False
    )
