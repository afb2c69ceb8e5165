"""The compiled libraries are built once per run, in a folder of their own."""

import pytest

from fpn_d2.modeling.ops import compiled_roi_align, winograd


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FPN_D2_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("FPN_D2_ROI_ALIGN", raising=False)
        patch.delenv("FPN_D2_CONV", raising=False)
        compiled_roi_align.library.cache_clear()
        winograd.library.cache_clear()
        yield
    compiled_roi_align.library.cache_clear()
    winograd.library.cache_clear()
