"""What every test gets."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

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
