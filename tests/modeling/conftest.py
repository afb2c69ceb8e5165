"""Detectron2's losses write to an event storage, which a trainer provides outside of tests."""

import pytest
from detectron2.utils.events import EventStorage


@pytest.fixture(autouse=True)
def event_storage():
    with EventStorage() as storage:
        yield storage
