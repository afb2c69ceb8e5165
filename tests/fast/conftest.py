"""The compiled libraries are built once per run, in a folder of their own; losses have a storage to write to."""

import pytest
from detectron2.utils.events import EventStorage

from fpn_d2.fast import winograd
from fpn_d2.fast.roi_align import compiled_roi_align


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FPN_D2_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("FPN_D2_ROI_ALIGN", raising=False)
        patch.delenv("FPN_D2_CONV", raising=False)
        compiled_roi_align.OP.forget()
        winograd.OP.forget()
        yield
    compiled_roi_align.OP.forget()
    winograd.OP.forget()


@pytest.fixture(autouse=True)
def event_storage():
    """Detectron2's losses write to an event storage, which a trainer provides outside of tests."""
    with EventStorage() as storage:
        yield storage
