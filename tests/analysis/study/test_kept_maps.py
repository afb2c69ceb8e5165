"""Kept maps of a frozen bottom-up pathway: the same as without, computed once, refused where they may change."""

import pytest
import torch
from torch import nn

from fpn_d2.analysis.study.kept_maps import KeptMaps
from fpn_d2.errors import UserError
from fpn_d2.modeling.bottom_up.timm_backbone import TimmBackbone


class Counting(TimmBackbone):
    calls = 0

    def forward(self, x):
        self.calls += 1
        assert len(x) == 1
        return super().forward(x)


@pytest.fixture
def bottom_up():
    torch.manual_seed(0)
    return Counting("test_efficientnet", out_features=["res2", "res3"], freeze_at=5)


def images(n, seed=1):
    return torch.randn(n, 3, 64, 96, generator=torch.Generator().manual_seed(seed))


def test_the_same_maps_computed_once(bottom_up, tmp_path):
    kept, x = KeptMaps(bottom_up, tmp_path).train(), images(3)
    plain = TimmBackbone.forward(bottom_up.eval(), x)
    for expected_calls in (3, 3):
        maps = kept(x)
        assert bottom_up.calls == expected_calls
        assert list(maps) == list(plain)
        for name, value in maps.items():
            torch.testing.assert_close(value, plain[name])
            assert not value.requires_grad
    assert len(list(tmp_path.rglob("*.pt"))) == 3 and not [f for f in tmp_path.rglob("*") if "unfinished" in f.name]
    kept(torch.cat([x[1:], x[:1].flip(-1)]))  # the mirrored one is another image
    assert bottom_up.calls == 4
    kept(x[:, :, :, :64])  # and so is a part of it, or the same bytes in another shape
    assert bottom_up.calls == 7
    kept(x.reshape(3, 3, 96, 64))
    assert bottom_up.calls == 10
    assert kept.output_shape() == bottom_up.output_shape() and kept.size_divisibility == bottom_up.size_divisibility


def test_other_weights_and_other_precision_have_other_maps(bottom_up, tmp_path):
    x = images(1)
    first = KeptMaps(bottom_up, tmp_path)(x)["res3"]
    with torch.autocast("cpu", torch.bfloat16):
        KeptMaps(bottom_up, tmp_path)(x)
    assert bottom_up.calls == 2
    with torch.no_grad():
        next(bottom_up.parameters()).mul_(1.5)
    second = KeptMaps(bottom_up, tmp_path)(x)["res3"]
    assert bottom_up.calls == 3 and not torch.equal(first, second)


def test_what_a_training_changes_is_refused(tmp_path):
    for freeze_at, norm in ((0, ""), (0, "FrozenBN"), (2, "")):
        with pytest.raises(UserError, match="MODEL.BACKBONE.FREEZE_AT to 5"):
            KeptMaps(TimmBackbone("test_efficientnet", freeze_at=freeze_at, norm=norm), tmp_path)
    only_statistics = nn.Sequential(nn.BatchNorm2d(3, affine=False))
    with pytest.raises(UserError, match="0 of 1 may change"):
        KeptMaps(only_statistics, tmp_path)
