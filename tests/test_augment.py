"""Augmentation against torchvision: the same explicit parameters, one sample and one op at a time, on float
tensors.
"""

import math
from typing import Any

import pytest
import torch
import torchvision.transforms.functional as F
from torch import Tensor
from torchvision.transforms import ColorJitter, RandomResizedCrop

from ssl_emp import augment
from ssl_emp.augment import (
    NUM_DRAW_FEATURES,
    Recipe,
    ViewParams,
    ViewSizes,
    cut_views,
    draw_features,
    draw_params,
    grid_of_views,
)

PLAIN: dict[str, Any] = {
    "flip_prob": 0.0,
    "jitter_prob": 0.0,
    "gray_prob": 0.0,
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
}
EVERYTHING: dict[str, Any] = {
    "blur_prob": 0.5,
    "hue": 0.2,
    "brightness": 0.8,
    "contrast": 0.8,
    "saturation": 0.8,
}


def photos(count: int, height: int, width: int | None = None, seed: int = 0) -> Tensor:
    """(count, 3, H, W) uint8: smooth colour gradients, hard edges, noise, and patches of black, white and
    grey.
    """
    width = width or height
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    images += 0.1 * torch.randn(images.shape, generator=generator)
    images[:, :, : height // 4, : width // 4] = 0.0
    images[:, :, -height // 4 :, -width // 4 :] = 1.0
    images[:, :, : height // 4, -width // 4 :] = 0.5
    images[:, 1:, height // 2, :] = 0.0  # a pure red line
    return (images.clamp(0, 1) * 255).round().byte()


def views_of(
    images: Tensor, recipe: Recipe, seed: int = 0, epoch: int = 0
) -> tuple[tuple[Tensor, ...], tuple[ViewParams, ViewParams]]:
    height, width = images.shape[2:]
    params = draw_params(seed, epoch, torch.arange(len(images)), recipe, (height, width))
    return cut_views(images, params, recipe), params


def row(params: ViewParams, i: int) -> ViewParams:
    return ViewParams(*(field[i] for field in params))


def oracle_crop(image: Tensor, p: ViewParams, recipe: Recipe) -> Tensor:
    padding, size = recipe.crop_padding, recipe.size
    image = F.pad(image / 255, [padding], padding_mode="reflect") if padding else image / 255
    box = [int(p.top) + padding, int(p.left) + padding, int(p.height), int(p.width)]
    view = F.resized_crop(image, *box, [size, size], antialias=True)
    return F.hflip(view) if p.flip else view


def oracle_jitter(view: Tensor, p: ViewParams) -> Tensor:
    for op in p.order.tolist() if p.jitter else []:
        view = (
            F.adjust_brightness(view, float(p.brightness)),
            F.adjust_contrast(view, float(p.contrast)),
            F.adjust_saturation(view, float(p.saturation)),
            F.adjust_hue(view, float(p.hue)),
        )[op]
    return view


def oracle_view(image: Tensor, p: ViewParams, recipe: Recipe) -> Tensor:
    view = oracle_jitter(oracle_crop(image, p, recipe), p)
    if p.gray:
        view = F.rgb_to_grayscale(view, 3)
    if p.blur:
        view = F.gaussian_blur(view, recipe.blur_kernel_size, float(p.blur_sigma))
    if p.solarize:
        view = F.solarize(view, 0.5)
    return F.normalize(view, recipe.mean, recipe.std)


def errors_against_oracle(images: Tensor, recipe: Recipe, seed: int = 0) -> Tensor:
    views, params = views_of(images, recipe, seed)
    expected = [
        torch.stack([oracle_view(image, row(p, i), recipe) for i, image in enumerate(images)]) for p in params
    ]
    return (torch.stack(views) - torch.stack(expected)).abs()


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize(
    "height, width, size, count",
    [
        (28, 28, 28, 32),
        (32, 32, 32, 32),
        (64, 64, 64, 16),
        (256, 256, 224, 3),
        (96, 96, 17, 16),  # shrinking: the filter widens
        (9, 9, 32, 16),  # growing
        (40, 72, 32, 32),
        (72, 40, 32, 32),
        (5, 64, 16, 16),  # most boxes do not fit: the fallback
    ],
)
def test_crop_resize_flip(height: int, width: int, size: int, count: int) -> None:
    recipe = Recipe(size, **(PLAIN | {"flip_prob": 0.5}))
    images = photos(count, height, width)
    _, (a, b) = views_of(images, recipe)
    assert {bool(f) for f in torch.cat([a.flip, b.flip])} == {True, False}
    assert errors_against_oracle(images, recipe).max() < 1e-5


def test_crop_sees_nothing_outside_its_box() -> None:
    recipe = Recipe(16, crop_scale=(0.1, 0.5), **PLAIN)
    images = photos(16, 32)
    views, params = views_of(images, recipe)
    for view, p in zip(views, params, strict=True):
        outside = torch.full_like(images, 255)
        for i, (top, left, height, width) in enumerate(zip(*(t.tolist() for t in p[:4]), strict=True)):
            box = slice(top, top + height), slice(left, left + width)
            outside[i][:, *box] = images[i][:, *box]
        again = cut_views(outside, (p, p), recipe)[0]
        assert torch.equal(again, view)


@pytest.mark.parametrize("size, padding, count", [(32, 4, 64), (28, 1, 32), (9, 8, 200)])
def test_padded_crop_is_torchvisions_to_the_bit(size: int, padding: int, count: int) -> None:
    recipe = Recipe(size, crop_padding=padding, **(PLAIN | {"flip_prob": 0.5}))
    images = photos(count, size)
    views, params = views_of(images, recipe)
    for view, p in zip(views, params, strict=True):
        for i, (top, left) in enumerate(zip(p.top.tolist(), p.left.tolist(), strict=True)):
            padded = F.pad(images[i], [padding], padding_mode="reflect")
            expected = F.crop(padded, top + padding, left + padding, size, size)
            expected = F.hflip(expected) if p.flip[i] else expected
            assert torch.equal((view[i] * 255).round().byte(), expected)
            assert torch.equal(view[i], expected * torch.tensor(1 / 255))


@pytest.mark.parametrize(
    "size, padding, image_size", [(32, 4, 28), (28, 4, 32), (32, 4, (32, 40)), (8, 8, 8)]
)
def test_padded_crops_need_images_of_the_views_size(
    size: int, padding: int, image_size: int | tuple[int, int]
) -> None:
    with pytest.raises(AssertionError, match="cannot cut"):
        draw_params(0, 0, torch.arange(2), Recipe(size, crop_padding=padding), image_size)


@pytest.mark.parametrize("op", ["brightness", "contrast", "saturation", "hue"])
def test_one_colour_op(op: str) -> None:
    strengths = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    strengths[op] = 0.5 if op == "hue" else 0.9
    recipe = Recipe(32, **(PLAIN | strengths | {"jitter_prob": 0.7}))
    images = photos(24, 32)
    assert errors_against_oracle(images, recipe).max() < 1e-5
    plain, _ = views_of(images, Recipe(32, **PLAIN))
    changed, (a, _) = views_of(images, recipe)
    moved = (changed[0] - plain[0]).abs().amax((1, 2, 3))
    assert (moved[a.jitter] > 1e-3).all() and (moved[~a.jitter] < 1e-6).all()


def test_colour_ops_in_every_order() -> None:
    recipe = Recipe(
        16,
        **(PLAIN | {"jitter_prob": 1.0, "hue": 0.5, "brightness": 0.9, "contrast": 0.9, "saturation": 0.9}),
    )
    images = photos(80, 16)
    _, (a, b) = views_of(images, recipe)
    assert len(set(map(tuple, torch.cat([a.order, b.order]).tolist()))) == 24
    # four ops' rounding, magnified by factors up to 1.9
    assert errors_against_oracle(images, recipe).max() < 3e-5


@pytest.mark.parametrize("size", [8, 32, 64])
def test_blur(size: int) -> None:
    recipe = Recipe(size, crop_scale=(1, 1), crop_ratio=(1, 1), **(PLAIN | {"blur_prob": 0.7}))
    images = photos(32, size)
    assert errors_against_oracle(images, recipe).max() < 1e-5
    (view, _), (a, _) = views_of(images, recipe)
    assert ((view - images / 255)[~a.blur].abs() < 1e-6).all() and a.blur.any() and not a.blur.all()


def test_blur_kernel_is_odd_and_about_a_tenth() -> None:
    sizes = torch.arange(8, 512)
    kernels = torch.tensor([Recipe(int(size)).blur_kernel_size for size in sizes])
    assert (kernels % 2 == 1).all() and Recipe(224).blur_kernel_size == 23
    assert (kernels[sizes > 40] / sizes[sizes > 40]).sub(0.1).abs().max() < 0.03


@pytest.mark.parametrize("prob", ["gray_prob", "solarize_prob"])
def test_gray_and_solarize(prob: str) -> None:
    recipe = Recipe(32, crop_scale=(1, 1), crop_ratio=(1, 1), **(PLAIN | {prob: 0.5}))
    assert errors_against_oracle(photos(64, 32), recipe).max() < 1e-6


@pytest.mark.parametrize(
    "height, width, size, count", [(32, 32, 32, 48), (48, 80, 64, 16), (256, 256, 224, 1)]
)
def test_full_chain(height: int, width: int, size: int, count: int) -> None:
    recipe = Recipe(size, **EVERYTHING)
    errors = errors_against_oracle(photos(count, height, width), recipe)
    assert errors.max() < 5e-4  # normalised units: 1e-4 of the pixel range
    assert errors.mean() < 1e-5


def test_full_chain_after_a_padded_crop() -> None:
    errors = errors_against_oracle(photos(48, 32), Recipe(32, crop_padding=6, **EVERYTHING))
    assert errors.max() < 5e-4 and errors.mean() < 1e-5


def test_full_chain_with_solarize() -> None:
    recipe = Recipe(32, solarize_prob=0.5, **EVERYTHING)
    errors = errors_against_oracle(photos(32, 32), recipe)
    # a rounding error at 0.5 turns into a jump: rare pixels only
    assert (errors > 5e-4).double().mean() < 1e-3


def test_nothing_random_is_the_identity() -> None:
    images = photos(8, 32)
    recipe = Recipe(32, crop_scale=(1, 1), crop_ratio=(1, 1), flip_prob=0, jitter_prob=0, gray_prob=0)
    for view in views_of(images, recipe)[0]:
        expected = F.normalize(images / 255, recipe.mean, recipe.std)
        assert view.shape == (8, 3, 32, 32) and view.dtype == torch.float32 and view.is_contiguous()
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-6)


def test_ops_of_no_strength_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object) -> None:
        raise AssertionError("ran an op that the recipe leaves out")

    images = photos(4, 16)
    with monkeypatch.context() as patch:
        patch.setattr(augment, "_jitter", forbidden)
        patch.setattr(augment, "_blur", forbidden)
        views_of(images, Recipe(16, jitter_prob=0))
    with monkeypatch.context() as patch:
        patch.setattr(augment, "_shift_hue", forbidden)
        views_of(images, Recipe(16, hue=0))
    with monkeypatch.context() as patch:
        patch.setattr(augment, "_blends", forbidden)
        views_of(images, Recipe(16, brightness=0, contrast=0, saturation=0))
        with pytest.raises(AssertionError):
            views_of(images, Recipe(16))


def test_a_view_does_not_depend_on_its_batch() -> None:
    recipe = Recipe(32, solarize_prob=0.2, **EVERYTHING)
    images, index = photos(48, 32), torch.arange(1000, 1048)
    whole = cut_views(images, draw_params(7, 3, index, recipe, 32), recipe)
    for part in (
        torch.tensor([5]),
        torch.arange(47, -1, -5),
        torch.randperm(48, generator=torch.Generator().manual_seed(0)),
    ):
        params = draw_params(7, 3, index[part], recipe, 32)
        for view, expected in zip(cut_views(images[part], params, recipe), whole, strict=True):
            # parameters are equal bit for bit (below); the mean grey of an image may be summed in another
            # order
            torch.testing.assert_close(view, expected[part], rtol=0, atol=1e-5)


@pytest.mark.parametrize("crop_padding", [0, 4])
def test_any_number_of_views(crop_padding: int) -> None:
    recipe, images, index = (
        Recipe(32, crop_padding=crop_padding, **EVERYTHING),
        photos(16, 32),
        torch.arange(16),
    )
    params = draw_params(0, 0, index, recipe, 32) + draw_params(0, 1, index, recipe, 32)
    four = cut_views(images, params, recipe)
    pairs = [*cut_views(images, params[:2], recipe), *cut_views(images, params[2:], recipe)]
    for i, (view, expected) in enumerate(zip(four, pairs, strict=True)):
        (alone,) = cut_views(images, params[i : i + 1], recipe)
        assert alone.shape == (16, 3, 32, 32) and alone.is_contiguous()
        for other in (view, alone):
            # the mean grey may be summed in another order
            torch.testing.assert_close(other, expected, rtol=0, atol=1e-5)


def test_two_views_differ() -> None:
    (a, b), _ = views_of(photos(32, 32), Recipe(32))
    assert ((a - b).abs().mean((1, 2, 3)) > 1e-2).all()


def test_only_uint8_images() -> None:
    recipe = Recipe(16)
    params = draw_params(0, 0, torch.arange(2), recipe, 16)
    for images in (torch.rand(2, 3, 16, 16), torch.zeros(2, 1, 16, 16, dtype=torch.uint8)):
        with pytest.raises(AssertionError, match="images are"):
            cut_views(images, params, recipe)


def test_autocast_does_not_make_pixels_coarse() -> None:
    recipe = Recipe(16, **EVERYTHING)
    expected, _ = views_of(photos(4, 16), recipe)
    with torch.autocast("cpu", torch.bfloat16):
        views, _ = views_of(photos(4, 16), recipe)
    assert all(torch.equal(view, other) for view, other in zip(views, expected, strict=True))


def test_inputs_are_left_alone() -> None:
    images, recipe = photos(4, 16), Recipe(16, solarize_prob=0.5, **EVERYTHING)
    params = draw_params(0, 0, torch.arange(4), recipe, 16)
    copies = images.clone(), [[field.clone() for field in p] for p in params]
    first, second = cut_views(images, params, recipe), cut_views(images, params, recipe)
    assert torch.equal(images, copies[0])
    assert all(
        torch.equal(x, y) for p, q in zip(params, copies[1], strict=True) for x, y in zip(p, q, strict=True)
    )
    assert torch.equal(torch.stack(first), torch.stack(second))


# ---------------------------------------------------------------- draws


def test_draws_are_a_function_of_seed_epoch_and_index() -> None:
    recipe = Recipe(32, blur_prob=0.5, solarize_prob=0.5)
    index = torch.arange(500)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    first, shuffled = draw_params(1, 2, index, recipe, 48), draw_params(1, 2, index[order], recipe, 48)
    for p, q in zip(first, shuffled, strict=True):
        for x, y in zip(p, q, strict=True):
            assert torch.equal(x[order], y)
    for other in (draw_params(2, 2, index, recipe, 48), draw_params(1, 3, index, recipe, 48), first[::-1]):
        same = (other[0].brightness == first[0].brightness).double().mean()
        assert same < 0.01


def test_no_global_generator() -> None:
    state = torch.random.get_rng_state()
    views_of(photos(4, 16), Recipe(16, solarize_prob=0.5, **EVERYTHING))
    assert torch.equal(torch.random.get_rng_state(), state)


def gap(ours: Tensor, theirs: Tensor) -> float:
    """Two-sample Kolmogorov-Smirnov distance over the 0.1 % limit: below 1 the samples look alike."""
    ours, theirs = ours.double().sort().values, theirs.double().sort().values
    points = torch.cat([ours, theirs])
    distances = [torch.searchsorted(s, points, right=True) / len(s) for s in (ours, theirs)]
    limit = 1.95 * math.sqrt(1 / len(ours) + 1 / len(theirs))
    return ((distances[0] - distances[1]).abs().max() / limit).item()


@pytest.mark.parametrize(
    "height, width, scale, ratio",
    [
        (32, 32, (0.08, 1.0), (3 / 4, 4 / 3)),
        (224, 160, (0.2, 1.0), (3 / 4, 4 / 3)),
        (20, 60, (0.5, 0.9), (0.5, 2.0)),  # half of the tries do not fit
    ],
)
def test_crop_boxes_are_torchvisions(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    n = 4000
    recipe = Recipe(32, crop_scale=scale, crop_ratio=ratio)
    a, b = draw_params(0, 0, torch.arange(n), recipe, (height, width))
    image = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.tensor(
            [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)]
        )
    top, left, box_height, box_width = theirs.unbind(1)
    for p in (a, b):
        assert ((p.top >= 0) & (p.left >= 0) & (p.height > 0) & (p.width > 0)).all()
        assert ((p.top + p.height <= height) & (p.left + p.width <= width)).all()
        assert gap(p.height * p.width, box_height * box_width) < 1
        assert gap(p.height / p.width, box_height / box_width) < 1
        assert gap(p.top / height, top / height) < 1 and gap(p.left / width, left / width) < 1
        assert gap(p.top / (height - p.height + 1), top / (height - box_height + 1)) < 1


@pytest.mark.parametrize("padding", [1, 4])
def test_padded_crops_are_uniform_over_their_places(padding: int) -> None:
    n, places = 24_300, 2 * padding + 1
    for p in draw_params(0, 0, torch.arange(n), Recipe(32, crop_padding=padding), 32):
        assert ((p.height == 32) & (p.width == 32)).all()
        offsets = torch.stack([p.top, p.left]) + padding
        assert offsets.min() == 0 and offsets.max() == 2 * padding
        # both at once: they are independent
        counts = (offsets[0] * places + offsets[1]).bincount(minlength=places**2)
        expected, freedom = n / places**2, places**2 - 1
        # chi-square
        assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


def test_padding_leaves_all_other_draws() -> None:
    index = torch.arange(100)
    for p, q in zip(
        draw_params(0, 0, index, Recipe(32), 32),
        draw_params(0, 0, index, Recipe(32, crop_padding=4), 32),
        strict=True,
    ):
        assert not torch.equal(p.top, q.top)
        assert all(torch.equal(x, y) for x, y in zip(p[4:], q[4:], strict=True))


@pytest.mark.parametrize("height, width", [(10, 100), (100, 10), (3, 3000), (3000, 1), (31, 29)])
def test_crop_falls_back_to_the_centre_as_torchvision_does(height: int, width: int) -> None:
    recipe = Recipe(8, crop_scale=(1.5, 2.0))  # nothing fits
    a, _ = draw_params(0, 0, torch.arange(3), recipe, (height, width))
    box = RandomResizedCrop.get_params(torch.empty(3, height, width), [1.5, 2.0], list(recipe.crop_ratio))
    assert torch.stack(a[:4], 1).tolist() == [list(box)] * 3


def test_colour_draws_are_torchvisions() -> None:
    n = 4000
    recipe = Recipe(32, brightness=0.4, contrast=1.5, saturation=0.8, hue=0.2)
    jitter = ColorJitter(0.4, 1.5, 0.8, 0.2)  # contrast: factors from max(0, 1 - 1.5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [
            jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
            for _ in range(n)
        ]
    theirs = torch.tensor([d[1:] for d in drawn])  # (n, 4)
    for p in draw_params(0, 0, torch.arange(n), recipe, 32):
        for ours, column in zip(
            (p.brightness, p.contrast, p.saturation, p.hue), theirs.unbind(1), strict=True
        ):
            assert gap(ours, column) < 1


def test_all_orders_are_equally_likely() -> None:
    n = 24_000
    for p in draw_params(0, 0, torch.arange(n), Recipe(32), 32):
        assert (p.order.sort(1).values == torch.arange(4)).all()
        counts = (p.order @ torch.tensor([64, 16, 4, 1])).bincount()
        counts = counts[counts > 0]
        assert len(counts) == 24
        assert ((counts - n / 24) ** 2 / (n / 24)).sum() < 23 + 5 * math.sqrt(2 * 23)  # chi-square


@pytest.mark.parametrize("prob", [0.0, 0.2, 0.8, 1.0])
def test_gates_open_as_often_as_asked(prob: float) -> None:
    n = 20_000
    recipe = Recipe(32, flip_prob=prob, jitter_prob=prob, gray_prob=prob, blur_prob=prob, solarize_prob=prob)
    a, b = draw_params(5, 6, torch.arange(n), recipe, 32)
    gates = torch.stack([g for p in (a, b) for g in (p.flip, p.jitter, p.gray, p.blur, p.solarize)]).double()
    limit = 4.5 * math.sqrt(prob * (1 - prob) / n)
    assert (gates.mean(1) - prob).abs().max() <= limit
    if 0 < prob < 1:  # and independently of each other and between the views
        assert (torch.corrcoef(gates) - torch.eye(10)).abs().max() < 4.5 / math.sqrt(n)


def test_blur_sigma_is_uniform() -> None:
    a, _ = draw_params(0, 0, torch.arange(4000), Recipe(32, blur_prob=0.5, blur_sigma=(0.1, 2.0)), 32)
    assert gap(a.blur_sigma, torch.linspace(0.1, 2.0, 100_000)) < 1


# ---------------------------------------------------------------- preview, compiler, devices


def test_grid_shows_the_pixels() -> None:
    images = photos(5, 16)
    recipe = Recipe(16, crop_scale=(1, 1), crop_ratio=(1, 1), flip_prob=0, jitter_prob=0, gray_prob=0)
    (a, b), _ = views_of(images, recipe)
    grid = grid_of_views(a, b, recipe, columns=3)
    assert grid.dtype == torch.uint8 and grid.shape == (3, 2 + 2 * 18, 2 + 3 * 34)  # 2 pixels of padding
    for i in range(5):
        top, left = 2 + i // 3 * 18, 2 + i % 3 * 34
        pair = torch.cat([images[i], images[i]], 2)
        assert torch.equal(grid[:, top : top + 16, left : left + 32], pair)


@pytest.mark.slow
def test_compiles_whole_and_once() -> None:
    recipe = Recipe(16, solarize_prob=0.2, **EVERYTHING)
    images, index = photos(8, 16), torch.arange(8)
    cut, draw = torch.compile(cut_views, fullgraph=True), torch.compile(draw_params, fullgraph=True)
    cut(images, draw(0, torch.tensor(0), index, recipe, 16), recipe)
    with torch.compiler.set_stance("fail_on_recompile"):
        for epoch in range(1, 4):
            params = draw(0, torch.tensor(epoch), index + epoch, recipe, 16)
            expected = draw_params(0, epoch, index + epoch, recipe, 16)
            for p, q in zip(params, expected, strict=True):
                for x, y in zip(p, q, strict=True):
                    torch.testing.assert_close(x, y, rtol=0, atol=1e-6)
            views, plain = cut(images, expected, recipe), cut_views(images, expected, recipe)
            # solarize jumps
            assert ((torch.stack(views) - torch.stack(plain)).abs() > 1e-4).double().mean() < 1e-3


@pytest.mark.slow
def test_one_padded_view_compiles() -> None:
    recipe = Recipe(16, crop_padding=4, **PLAIN)
    images, index = photos(8, 16), torch.arange(8)
    cut = torch.compile(cut_views, fullgraph=True, dynamic=False)
    for epoch in range(3):
        params = draw_params(0, epoch, index, recipe, 16)[:1]
        (view,), (expected,) = cut(images, params, recipe), cut_views(images, params, recipe)
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-6)


@pytest.mark.gpu
def test_gpu_gives_the_same_views() -> None:
    recipe = Recipe(32, **EVERYTHING)
    images, index = photos(64, 32), torch.arange(64)
    params, on_gpu = draw_params(0, 0, index, recipe, 32), draw_params(0, 0, index.cuda(), recipe, 32)
    for p, q in zip(params, on_gpu, strict=True):
        for x, y in zip(p, q, strict=True):
            torch.testing.assert_close(x, y.cpu(), rtol=0, atol=1e-6)
    there, index_there = images.cuda(), index.cuda()
    torch.cuda.set_sync_debug_mode("error")  # nothing may wait for the device
    try:
        views = cut_views(there, draw_params(0, 0, index_there, recipe, 32), recipe)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for view, expected in zip(views, cut_views(images, params, recipe), strict=True):
        torch.testing.assert_close(view.cpu(), expected, rtol=0, atol=1e-3)


def test_draw_features_against_boxes_counted_pixel_by_pixel() -> None:
    index = torch.arange(200)
    recipe = Recipe(16, crop_scale=(0.2, 1.0), blur_prob=0.5, solarize_prob=0.3)
    params_a, params_b = draw_params(0, 3, index, recipe, 20)
    features = draw_features(params_a, params_b, 20)
    assert features.shape == (200, NUM_DRAW_FEATURES) and features.isfinite().all()
    for i in range(50):
        masks = torch.zeros(2, 20, 20, dtype=torch.bool)
        for mask, p in zip(masks, (params_a, params_b), strict=True):
            mask[
                int(p.top[i]) : int(p.top[i] + p.height[i]), int(p.left[i]) : int(p.left[i] + p.width[i])
            ] = True
        both, either = (masks[0] & masks[1]).sum().item(), (masks[0] | masks[1]).sum().item()
        areas = [mask.sum().item() for mask in masks]
        assert features[i, 2].item() == pytest.approx(both / either, rel=1e-5)
        assert features[i, 4].item() == pytest.approx(both / min(areas), rel=1e-5)
        assert features[i, 0].item() == pytest.approx(
            torch.tensor(areas).float().div(400).log().sum().item(), rel=1e-4, abs=1e-5
        )
        bright = [float(p.brightness[i]) if p.jitter[i] else 1.0 for p in (params_a, params_b)]
        assert features[i, 5].item() == pytest.approx(abs(bright[0] - bright[1]), abs=1e-6)
        assert features[i, 9].item() == float(bool(params_a.gray[i]) != bool(params_b.gray[i]))


def test_two_equal_draws_are_no_distance_apart() -> None:
    params, _ = draw_params(0, 0, torch.arange(8), Recipe(16), 16)
    features = draw_features(params, params, 16)
    assert features[:, 2].allclose(torch.ones(8)) and features[:, [1, 5, 6, 7, 8, 9, 12, 13]].eq(0).all()


# ---- sizes by epoch ----------------------------------------------------------------------------------------


def test_the_size_of_each_epoch() -> None:
    """By hand; and the last epoch has the last size, however short the run is."""
    two, four = (
        ViewSizes(((16, 0.6), (24, 1.0))),
        ViewSizes(((12, 0.3), (16, 0.6), (20, 0.85), (24, 1.0))),
    )
    assert [two.at(epoch, 20) for epoch in range(20)] == [16] * 12 + [24] * 8
    assert [four.at(epoch, 20) for epoch in range(20)] == [12] * 6 + [16] * 6 + [20] * 5 + [24] * 3
    assert [two.at(epoch, 5) for epoch in range(5)] == [16, 16, 16, 24, 24]
    assert [two.at(epoch, 2) for epoch in range(2)] == [16, 24] and two.at(0, 1) == four.at(0, 1) == 24
    assert [ViewSizes(((8, 0.99), (9, 1.0))).at(epoch, 10) for epoch in (8, 9)] == [8, 9]
    again = ViewSizes(((16, 0.3), (16, 0.6), (24, 1.0)))
    assert all(again.at(epoch, 20) == two.at(epoch, 20) for epoch in range(20))
    assert again.all == [16, 24] and four.last == 24


def test_a_sample_has_the_same_draws_at_any_size() -> None:
    """Of the smooth part of an image a small view is the large one made smaller."""
    index = torch.arange(64)
    small, large = Recipe(12, **EVERYTHING), Recipe(24, **EVERYTHING)
    draws = [draw_params(3, 5, index, recipe, 32) for recipe in (small, large)]
    for ours, theirs in zip(*draws, strict=True):
        assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))
    ramp = torch.arange(32).view(1, 1, 1, 32).expand(64, 3, 32, 32).mul(7).to(torch.uint8)
    plain: dict[str, Any] = {"jitter_prob": 0.0, "gray_prob": 0.0, "crop_scale": (0.5, 1.0)}
    views = [
        cut_views(ramp, draw_params(3, 5, index, recipe, 32)[:1], recipe)[0]
        for recipe in (Recipe(12, **plain), Recipe(24, **plain))
    ]
    halved = torch.nn.functional.avg_pool2d(views[1], 2)
    inner = (views[0] - halved)[..., 2:-2]
    assert inner.abs().max() < 0.02 < (views[0] - halved.flip(0))[..., 2:-2].abs().max()
