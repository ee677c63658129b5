"""Random views of a whole batch, each sample with its own parameters: two for SimCLR, one if supervised.

Parameters are drawn first, as tensors keyed on (seed, epoch, index, view), and then applied: a sample gets
the same two views in any batch, on any rank, after any restart. Shapes are static and nothing waits for the
device, so `torch.compile` and CUDA graphs take all of it. The operations equal torchvision's transforms of
float tensors.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid

from ssl_emp.keyed import keyed_uniform

# op ids in `ViewParams.order`, as in torchvision's ColorJitter; 0 is brightness
CONTRAST, SATURATION, HUE = 1, 2, 3
CROP_TRIES = 10  # torchvision's RandomResizedCrop falls back to a centre crop after ten boxes that do not fit
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
NUM_DRAW_FEATURES = 14  # F of `draw_features`

Planes = list[Tensor]  # [red, green, blue], each (N, S, S) float32 in [0, 1] and contiguous, for speed


@dataclass(frozen=True)
class Recipe:
    """The distribution of views, in torchvision's units. An op of strength or probability 0 costs nothing."""

    size: int  # side of a view, pixels
    crop_scale: tuple[float, float] = (0.08, 1.0)  # area of the crop / area of the image
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, drawn log-uniformly
    # pixels; above 0: RandomCrop(size, padding, padding_mode="reflect") in place of the crop above
    crop_padding: int = 0
    flip_prob: float = 0.5
    jitter_prob: float = 0.8  # all four colour ops, in an order drawn per view, or none of them
    brightness: float = 0.4  # factor uniform in [max(0, 1 - x), 1 + x]; contrast and saturation alike
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1  # shift uniform in [-x, x] turns of the colour circle
    gray_prob: float = 0.2
    blur_prob: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarize_prob: float = 0.0  # inverts what is at or above 0.5
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @property
    def blur_kernel_size(self) -> int:
        """Odd, about a tenth of the view's side (SimCLR, appendix A), at least 3 pixels."""
        return 2 * max(1, self.size // 20) + 1


@dataclass(frozen=True)
class ViewSizes:
    """Side of the views by epoch: small first, since the cost of a step goes with their pixels.

    (FastDINOv2, arXiv 2507.03779; EfficientTrain++, arXiv 2405.08768.) The keyed draws are in pixels of the
    source image, so a sample has the same crops at any size. Of the operations only the blur's kernel follows
    the size (`Recipe.blur_kernel_size`), as it does in runs of one size.

    Args:
        stages: (pixels, share of the planned epochs after which the stage ends), shares rising to 1.
    """

    stages: tuple[tuple[int, float], ...]

    @property
    def last(self) -> int:
        """That of the encoder: its `image_size`."""
        return self.stages[-1][0]

    @property
    def all(self) -> list[int]:
        """Every size, once, the smallest first."""
        return sorted({size for size, _ in self.stages})

    def at(self, epoch: int, epochs: int) -> int:
        """The size in an epoch, counted from 0, of a run of so many: stages end after whole epochs, and the
        last epoch has the last size however short the run is.
        """
        ends = (min(round(share * epochs), epochs - 1) for _, share in self.stages[:-1])
        return self.stages[sum(end <= epoch for end in ends)][0]


class ViewParams(NamedTuple):
    """One view's parameters, a row per sample. (A tuple, so that `torch.compile` sees through it.)"""

    # (B,) int64, pixels of the source image; what lies outside of it (crop_padding only) is its mirror image
    top: Tensor
    left: Tensor  # (B,) int64
    height: Tensor  # (B,) int64
    width: Tensor  # (B,) int64
    flip: Tensor  # (B,) bool
    jitter: Tensor  # (B,) bool: whether the next five apply
    brightness: Tensor  # (B,) float32 factor
    contrast: Tensor  # (B,) float32 factor
    saturation: Tensor  # (B,) float32 factor
    hue: Tensor  # (B,) float32, turns
    order: Tensor  # (B, 4) int64: op ids, first applied first
    gray: Tensor  # (B,) bool
    blur: Tensor  # (B,) bool
    blur_sigma: Tensor  # (B,) float32, pixels
    solarize: Tensor  # (B,) bool


def draw_params(
    seed: int, epoch: int | Tensor, index: Tensor, recipe: Recipe, image_size: int | tuple[int, int]
) -> tuple[ViewParams, ViewParams]:
    """Draw the parameters of both views, a pure function of (seed, epoch, index).

    Args:
        seed, epoch: ints, or 0-d int64 tensors on the index's device (inside `torch.compile`, see
            `keyed_bits`).
        index: (B,) int64, the samples' places in the data set.
        image_size: side of square source images in pixels, or (height, width); `size` for `crop_padding`.

    Returns:
        Two `ViewParams` on the index's device.
    """
    rows, cols = (image_size, image_size) if isinstance(image_size, int) else image_size
    view = torch.arange(2, device=index.device).view(2, 1, 1)
    # add new draws at the end only, so that the existing ones keep their values
    slot = torch.arange(2 * CROP_TRIES + 16, device=index.device)
    u = keyed_uniform(seed, epoch, index.view(1, -1, 1), view, slot)  # (2, B, slots)
    area, ratio = u[..., :CROP_TRIES], u[..., CROP_TRIES : 2 * CROP_TRIES]
    u_top, u_left, flip, jitter, *colors, gray, blur, sigma, solarize = u[..., 2 * CROP_TRIES :].unbind(-1)
    brightness, contrast, saturation, hue, *order = colors
    both = ViewParams(
        *_crop_box(area, ratio, u_top, u_left, recipe, rows, cols),
        flip=flip < recipe.flip_prob,
        jitter=jitter < recipe.jitter_prob,
        brightness=_uniform(brightness, max(0.0, 1 - recipe.brightness), 1 + recipe.brightness),
        contrast=_uniform(contrast, max(0.0, 1 - recipe.contrast), 1 + recipe.contrast),
        saturation=_uniform(saturation, max(0.0, 1 - recipe.saturation), 1 + recipe.saturation),
        hue=_uniform(hue, -recipe.hue, recipe.hue),
        order=torch.stack(order, -1).argsort(dim=-1, stable=True),
        gray=gray < recipe.gray_prob,
        blur=blur < recipe.blur_prob,
        blur_sigma=_uniform(sigma, *recipe.blur_sigma),
        solarize=solarize < recipe.solarize_prob,
    )
    return ViewParams(*(field[0] for field in both)), ViewParams(*(field[1] for field in both))


def cut_views(images: Tensor, params: tuple[ViewParams, ...], recipe: Recipe) -> tuple[Tensor, ...]:
    """A view of a batch per set of parameters: crop, resize, flip, jitter, grey, blur, solarize, normalise.

    Args:
        images: (B, 3, H, W) uint8.
        params: from `draw_params` with the images' size, on the images' device; its `[:1]` for one view.

    Returns:
        (B, 3, size, size) float32 each, equal parts of one contiguous tensor.
    """
    assert images.dtype == torch.uint8, f"images are uint8, got {images.dtype}"
    assert images.ndim == 4 and images.shape[1] == 3, f"images are (B, 3, H, W), got {tuple(images.shape)}"
    # (nB, ...): all first views, then all second ones
    joined = ViewParams(*map(torch.cat, zip(*params, strict=True)))
    planes = color_tail(crop_resize_flip(images, joined, recipe), joined, recipe)
    planes = [(plane - m).div_(s) for plane, m, s in zip(planes, recipe.mean, recipe.std, strict=True)]
    return torch.stack(planes, 1).chunk(len(params))


def crop_resize_flip(images: Tensor, params: ViewParams, recipe: Recipe) -> Planes:
    """Cut n views of each image (B, 3, H, W) uint8 with (nB,) parameters: sample i has views i, B + i, ...

    Resampling is separable: one pass over the rows, a transposition, one pass over the columns, each with the
    sample's own weights. Equals torchvision's `resized_crop(antialias=True)`, which reads no pixel outside
    the crop, of the image padded with its reflection.
    """
    count, _, rows, cols = images.shape
    size, num_views, mirrors = recipe.size, len(params.top), recipe.crop_padding > 0
    index, weight = _resize_taps(params.top, params.height, None, rows, size, mirrors)  # (nB, S, K)
    image = torch.arange(num_views, dtype=torch.int32, device=images.device) % count
    # an image row with its three colours
    lines = images.transpose(1, 2).float().reshape(count * rows, 3 * cols)
    short = _mix_rows(lines, index + rows * image.view(-1, 1, 1), weight / 255)  # (nB, S, 3W)
    index, weight = _resize_taps(params.left, params.width, params.flip, cols, size, mirrors)
    lines = short.transpose(1, 2).reshape(num_views * 3 * cols, size)
    # (nB, 3, S, K), (nB, 1, S, K)
    index, weight = index.unsqueeze(1) + cols * _numbers(num_views, images.device), weight.unsqueeze(1)
    return list(_mix_rows(lines, index, weight).transpose(2, 3).unbind(1))


def color_tail(planes: Planes, params: ViewParams, recipe: Recipe) -> Planes:
    """Jitter, grey, blur and solarize, with (N,) parameters."""
    if recipe.jitter_prob > 0:
        planes = _jitter(planes, params, recipe)
    if recipe.gray_prob > 0:
        gray, is_gray = _gray(planes), _column(params.gray)
        planes = [torch.where(is_gray, gray, plane) for plane in planes]
    if recipe.blur_prob > 0:
        planes = _blur(planes, params, recipe)
    if recipe.solarize_prob > 0:
        is_solar = _column(params.solarize)
        planes = [torch.where(is_solar & (plane >= 0.5), 1 - plane, plane) for plane in planes]
    return planes


def draw_features(params_a: ViewParams, params_b: ViewParams, image_size: int) -> Tensor:
    """Covariates of a sample's loss, known from its parameters before a pixel is touched: (B, F) float32.

    Sizes and overlap of the two crops, and differences between the colour changes; an operation that a view
    does not undergo counts as no change.
    """
    boxes = [(p.top, p.left, p.top + p.height, p.left + p.width) for p in (params_a, params_b)]
    tall = torch.minimum(boxes[0][2], boxes[1][2]) - torch.maximum(boxes[0][0], boxes[1][0])
    wide = torch.minimum(boxes[0][3], boxes[1][3]) - torch.maximum(boxes[0][1], boxes[1][1])
    overlap = (tall.clamp(min=0) * wide.clamp(min=0)).float()
    area_a, area_b = ((p.height * p.width).float() for p in (params_a, params_b))
    iou = overlap / (area_a + area_b - overlap)
    covered = overlap / torch.minimum(area_a, area_b)
    log_a, log_b = (area_a / image_size**2).log(), (area_b / image_size**2).log()

    def apart(name: str, neutral: float) -> Tensor:
        a, b = (torch.where(p.jitter, getattr(p, name), neutral) for p in (params_a, params_b))
        return (a - b).abs()

    gray_differs, gray_both = (params_a.gray ^ params_b.gray).float(), (params_a.gray & params_b.gray).float()
    jittered = params_a.jitter.float() + params_b.jitter.float()
    crops = [log_a + log_b, (log_a - log_b).abs(), iou, iou.square(), covered]
    colours = [*(apart(name, 1.0) for name in ("brightness", "contrast", "saturation")), apart("hue", 0.0)]
    blurs = [(params_a.blur ^ params_b.blur).float(), (params_a.solarize ^ params_b.solarize).float()]
    return torch.stack([*crops, *colours, gray_differs, gray_both, jittered, *blurs], dim=1)


def grid_of_views(view_a: Tensor, view_b: Tensor, recipe: Recipe, columns: int = 8) -> Tensor:
    """Pairs of normalised (B, 3, S, S) views, `columns` pairs a row: a picture (3, H, W) uint8."""
    pairs = as_pixels(torch.cat([view_a, view_b], 3), recipe)  # (B, 3, S, 2S)
    return make_grid(pairs, nrow=columns, pad_value=255)


def as_pixels(views: Tensor, recipe: Recipe) -> Tensor:
    """Normalised views (B, 3, H, W) as a person sees them: uint8 of the same shape."""
    mean, std = (torch.tensor(x, device=views.device).view(3, 1, 1) for x in (recipe.mean, recipe.std))
    return ((views * std + mean).clamp(0, 1) * 255).round().byte()


def _uniform(u: Tensor, low: float, high: float) -> Tensor:
    """A number in [low, high) from one in [0, 1)."""
    return low + (high - low) * u


def _column(per_sample: Tensor) -> Tensor:
    return per_sample[:, None, None]  # (N,) -> (N, 1, 1), which broadcasts to planes


def _crop_box(
    area: Tensor, ratio: Tensor, u_top: Tensor, u_left: Tensor, recipe: Recipe, rows: int, cols: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height, width, as RandomResizedCrop draws them: the first of (..., tries) boxes that fits.

    With `crop_padding`, as RandomCrop draws them: a box of the image's size, uniform in the padded image.
    """
    if recipe.crop_padding > 0:
        assert rows == cols == recipe.size > recipe.crop_padding, (
            f"cannot cut {recipe} from {rows} x {cols} pixels"
        )
        side, places = torch.full_like(u_top, recipe.size, dtype=torch.int64), 2 * recipe.crop_padding + 1
        top, left = ((u * places).long() - recipe.crop_padding for u in (u_top, u_left))
        return top, left, side, side
    low, high = recipe.crop_ratio
    area = _uniform(area, *recipe.crop_scale) * (rows * cols)
    ratio = _uniform(ratio, math.log(low), math.log(high)).exp()
    widths, heights = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (widths > 0) & (widths <= cols) & (heights > 0) & (heights <= rows)
    first = fits.int().argmax(-1, keepdim=True)  # argmax takes the first of equals
    width, height, fitted = (t.gather(-1, first).squeeze(-1) for t in (widths, heights, fits))
    # else the largest centre crop whose ratio is allowed
    width = torch.where(fitted, width, max(1, min(cols, round(rows * high))))
    height = torch.where(fitted, height, max(1, min(rows, round(cols / low))))
    top = torch.where(fitted, (u_top * (rows - height + 1)).long(), (rows - height) // 2)
    left = torch.where(fitted, (u_left * (cols - width + 1)).long(), (cols - width) // 2)
    return top, left, height, width


def _resize_taps(
    start: Tensor, length: Tensor, flip: Tensor | None, size_in: int, size_out: int, mirrors: bool
) -> tuple[Tensor, Tensor]:
    """Input pixels (N, size_out, K) int32 and their float32 weights for every output pixel.

    The filter is a triangle with half-pixel centres, widened by the scale when shrinking (antialias), within
    [start, start + length); weights sum to one. `mirrors`: reflection outside the image, edges once.
    """
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    place = torch.arange(size_out, device=start.device).view(1, -1, 1) + 0.5
    if flip is not None:
        place = torch.where(flip.view(-1, 1, 1), size_out - place, place)
    scale = length / size_out
    support = scale.clamp_min(1)  # (N, 1, 1), input pixels
    centre = place * scale  # (N, size_out, 1), relative to the crop's edge for float32 precision
    # K: number of pixel centres within the widest support
    taps = torch.arange(math.ceil(2 * max(1, size_in / size_out)), device=start.device)
    pixel = (centre - support + 0.5).floor() + taps  # (N, size_out, K)
    weight = 1 - (pixel + 0.5 - centre).abs_() / support
    weight = torch.where((pixel >= 0) & (pixel < length), weight.clamp_min_(0), 0)
    pixel = start + pixel
    if mirrors:  # reflect at the first pixel, then at the last; skipped for crops inside the image
        pixel = pixel.abs_()
        pixel = torch.minimum(pixel, 2 * (size_in - 1) - pixel)
    return pixel.clamp_(0, size_in - 1).int(), weight.div_(weight.sum(2, keepdim=True))


def _mix_rows(rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of rows (R, D), by index (..., K) and weight that broadcasts to it: -> (..., D).

    A batched product with sparse matrices, K non-zeros a row; dense ones are many times slower on a CPU.
    """
    taps = index.shape[-1]
    weight = weight.expand(index.shape).reshape(-1, taps)
    mixed = F.embedding_bag(index.reshape(-1, taps), rows, mode="sum", per_sample_weights=weight)
    return mixed.view(*index.shape[:-1], -1)


def _numbers(num_views: int, device: torch.device) -> Tensor:
    """Index of each plane among the planes of all views, (num_views, 3, 1, 1) int32."""
    return torch.arange(3 * num_views, dtype=torch.int32, device=device).view(-1, 3, 1, 1)


def _jitter(planes: Planes, params: ViewParams, recipe: Recipe) -> Planes:
    """Brightness, contrast, saturation and hue, each sample in its own order.

    The place of the hue shift in the order differs between samples. To compute the shift once and not in each
    of four places, the other ops (blends) run both before and after it. On the side where a sample's blend
    does not belong its factor is 1, which changes nothing.
    """
    one = torch.ones_like(params.brightness)
    factors = torch.stack([params.brightness, params.contrast, params.saturation, one], 1)
    factors = factors.gather(1, params.order)
    factors = torch.where(params.jitter.unsqueeze(1), factors, 1.0)  # (N, 4), in the order of application
    has_blends = recipe.brightness > 0 or recipe.contrast > 0 or recipe.saturation > 0
    if recipe.hue == 0:
        slots = range(4) if has_blends else ()
        return _blends(planes, factors, params.order, slots, recipe)
    hue_done = (params.order == HUE).cumsum(1) > 0  # (N, 4)
    if has_blends:
        planes = _blends(planes, torch.where(hue_done, 1.0, factors), params.order, (0, 1, 2), recipe)
    planes = _shift_hue(planes, torch.where(params.jitter, params.hue, 0.0))
    if has_blends:
        planes = _blends(planes, torch.where(hue_done, factors, 1.0), params.order, (1, 2, 3), recipe)
    return planes


def _blends(
    planes: Planes, factors: Tensor, order: Tensor, slots: tuple[int, ...] | range, recipe: Recipe
) -> Planes:
    """f x + (1 - f) g in [0, 1]: g is 0 for brightness, mean grey for contrast, grey for saturation."""
    for slot in slots:
        factor, op = _column(factors[:, slot]), _column(order[:, slot])
        gray = _gray(planes)
        toward = gray * (op == SATURATION)
        if recipe.contrast > 0:
            toward += gray.mean((1, 2), keepdim=True) * (op == CONTRAST)
        planes = [torch.lerp(toward, plane, factor).clamp_(0, 1) for plane in planes]
    return planes


def _gray(planes: Planes) -> Tensor:
    red, green, blue = planes
    to_red, to_green, to_blue = GRAY_WEIGHTS
    return (red * to_red).add_(green, alpha=to_green).add_(blue, alpha=to_blue)


def _shift_hue(planes: Planes, turns: Tensor) -> Planes:
    """Shift the hue of the HSV colour by (N,) turns; value and saturation stay."""
    red, green, blue = planes
    value = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - low
    sector = torch.where(
        value == green, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)
    )
    sector = torch.where(value == red, green - blue, sector)
    sector = sector.div_(chroma.clamp_min(1e-12))  # hue in sixths of a turn; 0 for grey
    sector = sector.add_(_column(6 * turns)).remainder_(6)
    # share of the chroma in each channel, a piecewise linear function of the hue
    shares = (
        (sector - 3).abs_().sub_(1),
        (sector - 2).abs_().neg_().add_(2),
        (sector - 4).abs_().neg_().add_(2),
    )
    return [share.clamp_(0, 1).mul_(chroma).add_(low) for share in shares]


def _blur(planes: Planes, params: ViewParams, recipe: Recipe) -> Planes:
    """Gaussian blur with reflected borders, along one axis, then the other; no change where blur is off."""
    size, radius = recipe.size, recipe.blur_kernel_size // 2
    device = params.blur.device
    offset = torch.arange(-radius, radius + 1, device=device)  # (K,)
    kernel = torch.exp(-0.5 * (offset / params.blur_sigma.unsqueeze(1)) ** 2)  # (N, K)
    kernel = torch.where(params.blur.unsqueeze(1), kernel, (offset == 0).float())
    weight = (kernel / kernel.sum(1, keepdim=True)).view(-1, 1, 1, len(offset))
    # (S, K), reflected at the first pixel
    pixel = (torch.arange(size, device=device).unsqueeze(1) + offset).abs_()
    pixel = torch.minimum(pixel, 2 * (size - 1) - pixel).int()  # and at the last
    index = pixel + size * _numbers(len(kernel), device)  # (N, 3, S, K)
    both = torch.stack(planes, 1)  # (N, 3, S, S)
    for _ in range(2):
        both = _mix_rows(both.transpose(2, 3).reshape(-1, size), index, weight)
    return list(both.unbind(1))
