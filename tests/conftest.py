"""What every test gets."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fpn_d2.data.scenes import make_scenes

# What is compiled is kept with the other caches of the tests, not in the user's.
os.environ.setdefault("FPN_D2_CACHE", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"))
# A test of the command line would switch it on for others in the same process, whose peak of memory is looked at.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "0")


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from the same state of the random number generators, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Folder with six training scenes and three validation scenes of 64 x 64 pixels."""
    folder = tmp_path_factory.mktemp("engine") / "scenes"
    return make_scenes(
        folder, train=6, val=3, image_size=64, min_size=8, max_objects=3, empty=0.0, seed=3, progress=False
    )
