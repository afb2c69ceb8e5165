"""Each implementation that runs on a CPU against the loop, and against torchvision where that is defined."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_d2.fast.roi_align import compiled_roi_align, pyramid_roi_align, torch_roi_align

from .reference import SCALES, edge_rois, make_maps, random_rois, slow_roi_align, with_gradients


@pytest.fixture(params=["compiled", "torch", "torchvision"])
def implementation(request):
    if request.param == "compiled" and compiled_roi_align.library() is None:
        pytest.skip("no C++ compiler on this machine: the compiled pooling is NOT tested")
    return request.param


@pytest.fixture(params=["compiled", "torch"])
def fast(request):
    if request.param == "compiled" and compiled_roi_align.library() is None:
        pytest.skip("no C++ compiler on this machine: the compiled pooling is NOT tested")
    return request.param


def assert_close(actual, expected, rtol=1e-5, atol=1e-5):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=rtol, atol=atol)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 3])
@pytest.mark.parametrize("output_size", [(2, 3), (1, 1)])
def test_loop_in_float64(implementation, output_size, sampling_ratio, aligned):
    arguments = (*edge_rois(), SCALES, output_size, sampling_ratio, aligned)
    expected = with_gradients(slow_roi_align, make_maps(), *arguments)
    actual = with_gradients(pyramid_roi_align, make_maps(), *arguments, implementation=implementation)
    assert all(tensor.abs().sum() > 0 for tensor in expected)
    assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# Fewer than a vector, a vector, one more, several blocks of vectors and a rest.
@pytest.mark.parametrize("channels", [1, 16, 17, 83, 275])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_torchvision_in_float32(fast, channels, sampling_ratio):
    maps = make_maps(channels, dtype=torch.float32)
    arguments = (*random_rois(60), SCALES, (7, 7), sampling_ratio, True)
    expected = with_gradients(pyramid_roi_align, maps, *arguments, implementation="torchvision")
    assert_close(with_gradients(pyramid_roi_align, maps, *arguments, implementation=fast), expected)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 40),
    st.integers(1, 2),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.integers(0, 4),
    st.booleans(),
)
@pytest.mark.parametrize("name", ["compiled", "torch"])
def test_any_shape(name, seed, channels, images, output_size, map_size, sampling_ratio, aligned):
    if name == "compiled" and compiled_roi_align.library() is None:
        pytest.skip("no C++ compiler on this machine: the compiled pooling is NOT tested")
    maps = make_maps(channels, images, sizes=(map_size, (3, 8)), seed=seed)
    rois, level_indices = random_rois(6, images, 4 * map_size[0], 4 * map_size[1], levels=2, seed=seed)
    arguments = (rois, level_indices, (1 / 4, 1 / 7), output_size, sampling_ratio, aligned)
    expected = with_gradients(pyramid_roi_align, maps, *arguments, implementation="torchvision")
    actual = with_gradients(pyramid_roi_align, maps, *arguments, implementation=name)
    assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_gradcheck(fast):
    rois, level_indices = edge_rois()
    maps = [level_map.requires_grad_() for level_map in make_maps(channels=2, images=2, sizes=((4, 3), (2, 2), (1, 2)))]

    def pool(*maps):
        return pyramid_roi_align(maps, rois, level_indices, SCALES, (2, 2), 2, True, implementation=fast)

    assert torch.autograd.gradcheck(pool, maps)


def layouts():
    def spread(m):  # every second column of a wider map
        wide = m.new_zeros((*m.shape[:3], 2 * m.shape[3]))
        wide[..., ::2] = m
        return wide[..., ::2]

    return {
        "channels_last": lambda m: m.contiguous(memory_format=torch.channels_last),
        "spread": spread,
        "transposed": lambda m: m.transpose(2, 3).contiguous().transpose(2, 3),
    }


@pytest.mark.parametrize("layout", layouts())
def test_layouts_of_the_maps(implementation, layout):
    maps = make_maps(channels=20, dtype=torch.float32)
    arguments = (*random_rois(40), SCALES, (4, 3), 0, True)
    expected = with_gradients(pyramid_roi_align, maps, *arguments, implementation="torchvision")
    changed = [layouts()[layout](level_map) for level_map in maps]
    assert_close(with_gradients(pyramid_roi_align, changed, *arguments, implementation=implementation), expected)


def test_map_expanded_over_images(fast):
    single = make_maps(channels=5, images=1, dtype=torch.float32)
    arguments = (*random_rois(40), SCALES, (3, 3), 0, True)
    both = [level_map.expand(2, -1, -1, -1) for level_map in single]
    expected = pyramid_roi_align([m.clone() for m in both], *arguments, implementation="torchvision")
    assert_close([pyramid_roi_align(both, *arguments, implementation=fast)], [expected])


def test_layouts_of_the_gradient(fast):
    """Convolutional heads hand back a channels-last gradient, ``expand`` one without memory of its own."""
    maps = [level_map.requires_grad_() for level_map in make_maps(channels=20, dtype=torch.float32)]
    pooled = pyramid_roi_align(maps, *random_rois(40), SCALES, (4, 3), 0, True, implementation=fast)
    assert pooled.is_contiguous()
    gradient = torch.randn_like(pooled)
    expected = torch.autograd.grad(pooled, maps, gradient, retain_graph=True)
    channels_last = gradient.contiguous(memory_format=torch.channels_last)
    assert_close(torch.autograd.grad(pooled, maps, channels_last, retain_graph=True), expected, rtol=0, atol=0)
    ones = torch.autograd.grad(pooled, maps, torch.ones_like(pooled), retain_graph=True)
    assert_close(torch.autograd.grad(pooled.sum(), maps), ones, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(implementation, dtype):
    maps = make_maps(channels=35, dtype=dtype)
    arguments = (*random_rois(40, height=520, width=720), (1 / 40, 1 / 80, 1 / 160), (7, 7), 0, True)
    wide = [level_map.float() for level_map in maps]
    pooled, *gradients = with_gradients(pyramid_roi_align, maps, *arguments, implementation=implementation)
    assert pooled.dtype == dtype and all(gradient.dtype == dtype for gradient in gradients)
    expected = pyramid_roi_align(wide, *arguments, implementation="torchvision")
    ulp = torch.finfo(dtype).eps
    # Rounded once, at the end: within half a unit in the last place.
    torch.testing.assert_close(pooled.float(), expected, rtol=0.5001 * ulp, atol=1e-6)
    generator = torch.Generator().manual_seed(7)
    gradient = torch.randn(pooled.shape, generator=generator, dtype=torch.float64).to(dtype).float()
    leaves = [level_map.requires_grad_() for level_map in wide]
    exact = pyramid_roi_align(leaves, *arguments, implementation="torchvision")
    expected = torch.autograd.grad(exact, leaves, gradient)
    assert_close([g.float() for g in gradients], expected, rtol=0.5001 * ulp, atol=1e-5)


def test_half_precision_boxes(implementation):
    maps = make_maps(dtype=torch.float32)
    rois, level_indices = random_rois(20)
    expected = pyramid_roi_align(maps, rois.half().float(), level_indices, SCALES, (3, 3), 0, True)
    actual = pyramid_roi_align(maps, rois.half(), level_indices, SCALES, (3, 3), 0, True, implementation=implementation)
    assert_close([actual], [expected])


@pytest.mark.parametrize("images", [0, 2])
def test_no_rois(implementation, images):
    maps = make_maps(images=images, dtype=torch.float32)
    rois, level_indices = torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)
    arguments = (rois, level_indices, SCALES, (4, 3), 0, True)
    pooled, *gradients = with_gradients(pyramid_roi_align, maps, *arguments, implementation=implementation)
    assert pooled.shape == (0, 3, 4, 3)
    for gradient, level_map in zip(gradients, maps, strict=True):
        assert torch.equal(gradient, torch.zeros_like(level_map))


def test_levels_and_images_without_rois(implementation):
    rois, level_indices = random_rois(10)
    rois[:, 0], level_indices[:] = 1, 2
    arguments = (rois, level_indices, SCALES, (4, 3), 0, True)
    _, *gradients = with_gradients(pyramid_roi_align, make_maps(), *arguments, implementation=implementation)
    used = [[bool(image.abs().sum() > 0) for image in gradient] for gradient in gradients]
    assert used == [[False, False], [False, False], [False, True]]


def test_no_gradient_for_rois(fast):
    rois, level_indices = edge_rois()
    rois.requires_grad_()
    maps = [level_map.requires_grad_() for level_map in make_maps()]
    pyramid_roi_align(maps, rois, level_indices, SCALES, (2, 2), 0, True, implementation=fast).sum().backward()
    assert rois.grad is None and maps[0].grad.abs().sum() > 0
    with torch.no_grad():
        pooled = pyramid_roi_align(maps, rois, level_indices, SCALES, (2, 2), 0, True, implementation=fast)
    assert not pooled.requires_grad


def test_no_second_derivative(fast):
    leaf = make_maps()[0].requires_grad_()
    rois, level_indices = edge_rois()
    pooled = pyramid_roi_align(
        [leaf], rois, torch.zeros_like(level_indices), SCALES[:1], (2, 2), 0, True, implementation=fast
    )
    gradient = torch.autograd.grad(pooled.square().sum(), leaf, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_nan_and_infinity_in_the_maps(fast, value, sampling_ratio):
    maps = make_maps(channels=18, dtype=torch.float32)
    for level_map in maps:
        level_map[0, :, 1, 2] = value
        level_map[1, 5, 3, 3] = value
    arguments = (*random_rois(60), SCALES, (5, 5), sampling_ratio, True)
    expected = pyramid_roi_align(maps, *arguments, implementation="torchvision")
    actual = pyramid_roi_align(maps, *arguments, implementation=fast)
    # A sample exactly on a neighbour of an infinite number gives 0 * inf: NaN or infinite may differ, finite not.
    finite = expected.isfinite()
    assert 0.2 < finite.float().mean() < 0.999
    assert torch.equal(actual.isfinite(), finite)
    assert torch.equal(actual.isnan() | actual.isinf(), ~finite)
    torch.testing.assert_close(actual[finite], expected[finite], rtol=1e-5, atol=1e-5)


def test_infinite_gradient_reaches_what_it_touches(fast):
    maps = make_maps(channels=3, dtype=torch.float32)
    results = []
    for name in ("torchvision", fast):
        leaves = [level_map.detach().requires_grad_() for level_map in maps]
        pooled = pyramid_roi_align(leaves, *random_rois(30), SCALES, (5, 5), 0, True, implementation=name)
        gradient = torch.ones_like(pooled)
        gradient[3, 1, 2, 2] = float("inf")
        results.append(torch.autograd.grad(pooled, leaves, gradient))
    for stock, ours in zip(*results, strict=True):
        assert torch.equal(stock.isfinite(), ours.isfinite())
    assert not all(stock.isfinite().all() for stock in results[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rois_that_are_not_finite_pool_nan_and_disturb_no_others(fast, value):
    rois, level_indices = edge_rois()
    broken = rois.clone()
    broken[1, 2], broken[8, 3] = value, -value
    arguments = (SCALES, (2, 2), 0, True)
    actual = pyramid_roi_align(make_maps(), broken, level_indices, *arguments, implementation=fast)
    expected = pyramid_roi_align(make_maps(), rois, level_indices, *arguments, implementation="torchvision")
    expected[[1, 8]] = float("nan")
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_rois_far_larger_than_the_map(fast, sampling_ratio):
    rois = torch.tensor([[0, -900.0, -700, 1000, 800], [1, 5, -2000, 60, 30], [1, -4000, 3, 70, 2000]]).double()
    arguments = (rois, torch.tensor([0, 1, 0]), SCALES, (3, 4), sampling_ratio, True)
    expected = with_gradients(pyramid_roi_align, make_maps(), *arguments, implementation="torchvision")
    actual = with_gradients(pyramid_roi_align, make_maps(), *arguments, implementation=fast)
    assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    # More samples than there is memory or time for, nearly all of them outside, where they count as 0.
    arguments = (torch.tensor([[0, -4e8, -4e8, 4e8, 4e8]]).double(), torch.tensor([0]), SCALES, (1, 1), 0, True)
    pooled = pyramid_roi_align(make_maps(), *arguments, implementation=fast)
    assert pooled.abs().max() < 1e-6


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("channels", [3, 40])
def test_number_of_threads_changes_no_bit(fast, threads, channels):
    maps = make_maps(channels, dtype=torch.float32)
    arguments = (*random_rois(100), SCALES, (5, 5), 0, True)
    before = torch.get_num_threads()
    results = []
    try:
        for number in (1, threads, threads):
            torch.set_num_threads(number)
            results.append(with_gradients(pyramid_roi_align, maps, *arguments, implementation=fast))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("limit", ["_MAX_POSITIONS", "_MAX_PAIRS"])
def test_many_rois_in_parts(limit, monkeypatch):
    maps = make_maps(dtype=torch.float32)
    arguments = (*random_rois(100), SCALES, (5, 5), 0, True)
    expected = with_gradients(pyramid_roi_align, maps, *arguments, implementation="torch")
    parts = []
    original = torch_roi_align._Pairs.__init__
    monkeypatch.setattr(torch_roi_align._Pairs, "__init__", lambda *a: parts.append(1) or original(*a))
    pyramid_roi_align(maps, *arguments, implementation="torch")
    assert len(parts) == len(maps)
    monkeypatch.setattr(torch_roi_align, limit, 50)
    assert_close(with_gradients(pyramid_roi_align, maps, *arguments, implementation="torch"), expected)
    assert len(parts) > 10 * len(maps)


@pytest.mark.parametrize("rois_of_a_part", [0, 1, 3, 13, 100])
def test_cells_in_parts(rois_of_a_part, monkeypatch):
    """Each RoI's cells alone, too few values for one, some RoIs left over for the last part, none left over."""
    arguments = (*random_rois(39), SCALES, (2, 3), 2, True)
    expected = pyramid_roi_align(make_maps(), *arguments, implementation="torch")
    assert_close([expected], [slow_roi_align(make_maps(), *arguments)])
    parts, original = [], torch_roi_align.F.embedding_bag
    monkeypatch.setattr(torch_roi_align.F, "embedding_bag", lambda *a, **k: parts.append(1) or original(*a, **k))
    monkeypatch.setattr(torch_roi_align, "_MAX_VALUES", rois_of_a_part * 6 * make_maps()[0].shape[1])
    assert torch.equal(pyramid_roi_align(make_maps(), *arguments, implementation="torch"), expected)
    each = max(1, rois_of_a_part)
    assert len(parts) == sum(-(-int((arguments[1] == level).sum()) // each) for level in range(len(SCALES)))


def test_one_level_and_ints_in_a_list(implementation):
    maps = make_maps()[1:2]
    rois, level_indices = edge_rois()
    arguments = (rois, torch.zeros_like(level_indices), [1 / 8], [2, 3], 2, True)
    assert_close(
        [pyramid_roi_align(maps, *arguments, implementation=implementation)], [slow_roi_align(maps, *arguments)]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(scales=[0.25]), "3 maps and 1 scales"),
        (lambda a: a.update(maps=[], scales=[]), "1 or more maps"),
        (lambda a: a["maps"].__setitem__(1, torch.zeros(2, 4, 7, 9)), "N and C the same"),
        (lambda a: a["maps"].__setitem__(1, torch.zeros(2, 3, 0, 9)), "height, width"),
        (lambda a: a["maps"].__setitem__(1, a["maps"][1].double()), "differ in dtype"),
        (lambda a: a.update(maps=[m.long() for m in a["maps"]]), "floating-point"),
        (lambda a: a.update(rois=a["rois"][:, :4]), r"\(20, 4\)"),
        (lambda a: a.update(level_indices=a["level_indices"].int()), "torch.int32"),
        (lambda a: a.update(level_indices=a["level_indices"][1:]), r"expected \(20,\)"),
        (lambda a: a.update(level_indices=a["level_indices"] + 1), "reach from 1 to 3, with 3 maps"),
        (lambda a: a.update(level_indices=a["level_indices"] - 1), "reach from -1"),
        (lambda a: a["rois"].__setitem__((0, 0), 2), "with 2 images"),
        (lambda a: a["rois"].__setitem__((0, 0), -1), "with 2 images"),
        (lambda a: a["rois"].__setitem__((0, 0), float("nan")), "with 2 images"),
        (lambda a: a.update(output_size=(0, 3)), "at least 1"),
        (lambda a: a.update(sampling_ratio=-1), "at least 0"),
        (lambda a: a.update(implementation="fast"), "compiled, torch, triton"),
    ],
)
def test_mistakes(change, message):
    rois, level_indices = random_rois(20)
    level_indices[0], level_indices[1] = 0, 2
    arguments = {
        "maps": make_maps(dtype=torch.float32),
        "rois": rois,
        "level_indices": level_indices,
        "scales": list(SCALES),
        "output_size": (2, 2),
        "sampling_ratio": 0,
        "aligned": True,
    }
    pyramid_roi_align(**arguments)
    change(arguments)
    with pytest.raises(ValueError, match=message):
        pyramid_roi_align(**arguments)
