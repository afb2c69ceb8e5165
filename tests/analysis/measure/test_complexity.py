"""Parameters and multiply-adds against counts by hand."""

import torch
import torch.nn.functional as F
from torch import nn

from fpn_d2.analysis import count_macs, count_parameters
from fpn_d2.fast.linear import linear


def test_parameters_count_once():
    shared = nn.Linear(3, 4)
    frozen = nn.Conv2d(2, 5, 3)
    frozen.requires_grad_(False)
    assert count_parameters(nn.Sequential(shared, shared), frozen, shared) == (3 * 4 + 4) + (2 * 5 * 9 + 5)


def test_multiply_adds_of_a_strided_grouped_convolution():
    conv = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4)
    # Each of 12 x 5 x 7 outputs is a sum over 2 input channels and 9 cells.
    assert count_macs(lambda: conv(torch.zeros(3, 8, 10, 13))) == 3 * 12 * 5 * 7 * 2 * 9


def test_multiply_adds_of_attention_on_both_devices():
    def attention(device):
        q = torch.zeros(2, 4, 10, 16, device=device)
        return count_macs(lambda: F.scaled_dot_product_attention(q, q, q))

    # Queries times keys, weights times values.
    assert attention("cpu") == attention("meta") == 2 * (2 * 4 * 10 * 10 * 16)


def test_products_of_onednn_count_as_any():
    layer = nn.Linear(8, 16)
    assert count_macs(lambda: linear(layer, torch.zeros(3, 8))) == 3 * 8 * 16


def test_weights_do_not_matter():
    conv = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with torch.device("meta"):
        on_meta = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3))
    images = torch.rand(1, 3, 9, 9)
    assert count_macs(lambda: conv(images)) == count_macs(lambda: on_meta(images.to("meta"))) == 81 * 12 + 49 * 72
