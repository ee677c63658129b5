"""Features without labels: collapse, effective rank, alignment, uniformity; pictures and tables of them.

Letters: N samples, D feature dimensions. Rows are compared by direction alone (divided by their length), as
kNN and NT-Xent do. Rows that are all zero have no direction: they are counted and left out.
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from linear_eval.artifacts import COLOURS, artifact, new_figure, save_figure
from linear_eval.features import EvalError, Pixels
from linear_eval.knn import exact_cosines
from linear_eval.names import printable, shorten

MapMethod = Literal["pca", "umap"]
MAX_SAMPLES = 10_000  # that the figures come from
NUM_QUERIES = NUM_NEIGHBORS = 8  # of the picture of neighbours
PAIR_CHUNK = 1024  # rows whose distances to all others are held at once
PCA_SIDE = 2048  # an eigendecomposition of this size takes about three seconds on one core
TILE = 72  # pixels a side of a picture in the grid
SAME, OTHER, NEUTRAL = COLOURS[0], COLOURS[1], COLOURS[7]


@dataclass(frozen=True)
class Diagnosis:
    """Label-free figures of features (N, D).

    Attributes:
        num_samples: rows that the figures come from.
        dim: D.
        num_zero: of those, rows that are all zero.
        num_constant: dimensions that have the same value in every row.
        feature_std: see `feature_std`; 1 / sqrt(D) for directions spread evenly, 0 when all are one.
        effective_rank: see `effective_rank`; up to min(num_samples, D).
        uniformity: see `uniformity`; 0 when all directions are one.
        uniformity_even: what directions spread evenly over the sphere would have.
        alignment: see `alignment`; None without a second view.
    """

    num_samples: int
    dim: int
    num_zero: int
    num_constant: int
    feature_std: float
    effective_rank: float
    uniformity: float
    uniformity_even: float
    alignment: float | None


def diagnose(
    x: Tensor, *, views: tuple[Tensor, Tensor] | None = None, max_samples: int = MAX_SAMPLES, seed: int = 0
) -> Diagnosis:
    """All figures at once.

    Args:
        x: (N, D) features of N different images.
        views: two (M, D) tensors, row by row features of two augmented views of one image.
        max_samples: more rows than these are a random subset: uniformity costs its square. The effective
            rank grows with it until it is several times D.
        seed: of the subset.

    Raises:
        EvalError: fewer than two rows, features that are not finite, views that do not fit.
    """
    _check_rows(x, "features")
    if views is not None:
        for view in views:
            _check_rows(view, "view features")
        if views[0].shape != views[1].shape:
            fix = "give two views of the same images"
            raise EvalError(f"the views are {tuple(views[0].shape)} and {tuple(views[1].shape)}", fix)
    x = x[_subset(len(x), max_samples, seed)].detach().cpu().float()
    zero = ~x.any(dim=1)
    return Diagnosis(
        num_samples=len(x),
        dim=x.shape[1],
        num_zero=int(zero.sum()),
        num_constant=int((x == x[0]).all(dim=0).sum()),
        feature_std=feature_std(x),
        effective_rank=effective_rank(x),
        uniformity=uniformity(x),
        uniformity_even=uniformity_of_sphere(x.shape[1]),
        alignment=None if views is None else alignment(*views),
    )


def verdict(found: Diagnosis) -> list[str]:
    """A diagnosis in plain words. Its bounds (0.1, 0.4 of an even spread, 5 % of the rank) are customary."""
    lines = []
    spread = found.feature_std * math.sqrt(found.dim)
    figures = (
        f"the std of normalised features is {found.feature_std:.4f}, {1 / math.sqrt(found.dim):.4f} "
        "is an even spread"
    )
    if spread < 0.1:
        lines.append(f"features are collapsed: {figures}; all images look nearly the same to this encoder")
    elif spread < 0.4:
        lines.append(f"features share a strong common direction: {figures}")
    else:
        lines.append(f"features are spread out: {figures}")
    highest = min(found.num_samples, found.dim)
    share = found.effective_rank / highest
    rank = f"effective rank {found.effective_rank:.1f} of at most {highest}"
    lines.append(f"few directions are used: {rank}" if share < 0.05 else rank)
    lines.append(
        f"uniformity {found.uniformity:.2f}, lower is more even: 0 is a single point, "
        f"{found.uniformity_even:.2f} an even spread"
    )
    if found.alignment is not None:
        lines.append(
            f"alignment {found.alignment:.3f}, lower is closer: 0 is two identical views, 2 two "
            "unrelated ones"
        )
        if found.alignment < 0.1 and spread < 0.1:
            lines.append("the views align only because everything does: a collapse, not invariance")
    if found.num_constant:
        lines.append(f"{found.num_constant} of {found.dim} dimensions have one value for every image")
    if found.num_zero:
        lines.append(
            f"{found.num_zero} of {found.num_samples} features are all zero: kNN has no answer for them"
        )
    return lines


# ---- figures


def feature_std(x: Tensor) -> float:
    """Mean standard deviation of the dimensions of normalised rows (N, D) (SimSiam, 2021, section 4.1)."""
    unit = _directions(x)
    return unit.std(dim=0, correction=0).mean().item() if len(unit) else 0.0


def effective_rank(x: Tensor, *, epsilon: float = 1e-7) -> float:
    """RankMe (arXiv 2210.02885, equation 1) of (N, D): exp of the entropy of p = s / sum(s) + epsilon.

    s are the singular values of the rows as they are, neither centred nor normalised. They come from the
    smaller Gram matrix in float64, good to 1e-8 of the largest: below epsilon. All zero: rank 0.
    """
    x = x.detach().cpu().double()
    gram = x.T @ x if len(x) >= x.shape[1] else x @ x.T
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    if values.sum() == 0:
        return 0.0
    p = values / values.sum() + epsilon
    return (-(p * p.log()).sum()).exp().item()


def alignment(a: Tensor, b: Tensor, *, power: float = 2) -> float:
    """Mean of ||a_i - b_i||_2 ^ power over pairs of normalised rows (M, D) (arXiv 2005.10242)."""
    both = a.any(dim=1) & b.any(dim=1)
    return (
        torch.linalg.vector_norm(_directions(a[both]) - _directions(b[both]), dim=1).pow(power).mean().item()
    )


def uniformity(x: Tensor, *, t: float = 2) -> float:
    """log of the mean of exp(-t ||x_i - x_j||_2^2), i < j, of normalised rows (N, D) (arXiv 2005.10242)."""
    unit = _directions(x)
    if len(unit) < 2:
        return 0.0
    total = 0.0
    for start in range(0, len(unit), PAIR_CHUNK):
        cosine = unit[start : start + PAIR_CHUNK] @ unit[start:].T  # (R, N - start)
        # ||a - b||^2 = 2 - 2 cosine for unit rows; each pair once, above the diagonal
        total += (2 * t * (cosine - 1)).exp().triu(diagonal=1).sum(dtype=torch.float64).item()
    return math.log(total / (len(unit) * (len(unit) - 1) / 2))


def uniformity_of_sphere(dim: int, *, t: float = 2) -> float:
    """`uniformity` of an even spread: -2t + log of sum_k t^2k / (k! (D/2)(D/2 + 1)...(D/2 + k - 1)).

    The mean of exp(2t cosine) over the sphere, a confluent hypergeometric limit function 0F1(D/2; t^2).
    """
    term = total = 1.0
    for k in range(1, 200):
        term *= t * t / (k * (dim / 2 + k - 1))
        total += term
    return math.log(total) - 2 * t


# ---- neighbours


def nearest_rows(x: Tensor, queries: Tensor, num_neighbors: int) -> Tensor:
    """(Q, k) rows of x (N, D) closest by cosine to its rows `queries` (Q,), without them; ties: lowest first.

    Raises:
        EvalError: k is not in 1..N - 1, a row is no row of x.
    """
    if not 1 <= num_neighbors < len(x):
        fix = f"choose 1 to {len(x) - 1}"
        raise EvalError(f"num_neighbors is {num_neighbors}, there are {len(x)} images", fix)
    if len(queries) == 0 or queries.min() < 0 or queries.max() >= len(x):
        fix = "name rows of the features, at least one"
        raise EvalError(f"the query rows are not all in 0..{len(x) - 1}", fix)
    # (Q, N): with a common offset, float32 could not tell them apart
    cosine, _ = exact_cosines(x[queries], x)
    cosine[torch.arange(len(queries)), queries] = -torch.inf
    return cosine.argsort(dim=1, descending=True, stable=True)[:, :num_neighbors]


def draw_neighbors(
    path: Path,
    pixels: Pixels,
    x: Tensor,
    *,
    queries: Tensor | None = None,
    labels: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    num_queries: int = NUM_QUERIES,
    num_neighbors: int = NUM_NEIGHBORS,
    seed: int = 0,
) -> Tensor:
    """A PNG: a line for each query, at the left, then its nearest neighbours; gives their rows (Q, k).

    With labels, a neighbour has a blue frame if its class is the query's, else an orange one and a cross.

    Args:
        pixels: (N, 3, S, S) uint8, read one image at a time.
        x: (N, D) features of the same images.
        queries: (Q,) rows; None: `num_queries` drawn by `seed`.
        labels: (N,) class ids; class_names: their names, written below the pictures.

    Raises:
        EvalError: counts that do not fit, a file that cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    if len(pixels) != len(x) or (labels is not None and len(labels) != len(x)):
        counts = f"{len(pixels)} images, {len(x)} features"
        counts += "" if labels is None else f", {len(labels)} labels"
        raise EvalError(counts, "give one feature and one label for each image")
    queries = _subset(len(x), num_queries, seed) if queries is None else queries
    neighbors = nearest_rows(x, queries, num_neighbors)
    gap, frame, text = 6, 3, 0 if labels is None else 14
    step = TILE + 2 * frame + gap
    size = (gap + step * (num_neighbors + 1) + 2 * gap, gap + (step + text) * len(queries))
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=10)
    for line, (query, row) in enumerate(zip(queries.tolist(), neighbors.tolist(), strict=True)):
        for column, sample in enumerate([query, *row]):
            left = gap + step * column + (2 * gap if column else 0)  # a wider gap beside the query
            top = gap + (step + text) * line
            same = labels is None or bool(labels[sample] == labels[query])
            colour = NEUTRAL if column == 0 or labels is None else SAME if same else OTHER
            pen.rectangle((left, top, left + TILE + 2 * frame - 1, top + TILE + 2 * frame - 1), fill=colour)
            image = Image.fromarray(pixels[sample : sample + 1][0].permute(1, 2, 0).numpy())
            smoothing = Image.Resampling.NEAREST if image.width < TILE else Image.Resampling.LANCZOS
            canvas.paste(image.resize((TILE, TILE), smoothing), (left + frame, top + frame))
            if not same:  # a cross, for readers who cannot tell the colours apart
                right, low = left + frame + TILE - 3, top + frame + 2
                pen.rectangle((right - 11, low - 2, right + 2, low + 11), fill="white")
                pen.line((right - 9, low, right, low + 9), fill=OTHER, width=2)
                pen.line((right - 9, low + 9, right, low), fill=OTHER, width=2)
            if labels is not None:
                label = int(labels[sample])
                name = class_names[label] if class_names else str(label)
                place = (left + frame, top + TILE + 2 * frame + 1)
                pen.text(place, printable(name[:13])[:13], fill="black", font=font)
    with artifact(path) as file:
        canvas.save(file, "PNG")
    return neighbors


# ---- map and table


def map_2d(x: Tensor, *, method: MapMethod = "pca", seed: int = 0) -> Tensor:
    """(N, 2) float32 coordinates of rows (N, D) by their directions, for looking at.

    `pca`: the two directions of most variance, each signed so that its largest weight is positive; where N
    and D are both above 2,048, found on a random 2,048 rows. `umap`: neighbourhoods kept (McInnes et al.
    2018), cosine, one thread for the sake of `seed`.

    Raises:
        EvalError: fewer than two rows, features that are not finite, umap-learn not installed.
    """
    _check_rows(x, "features")
    unit = _unit_rows(x)
    if method == "pca":
        return _pca(unit, seed)
    if method != "umap":
        raise EvalError(f"the map's method is {method!r}", "choose pca or umap")
    try:
        umap = importlib.import_module("umap")  # an optional package without types
    except ImportError as error:
        fix = "pip install umap-learn (extra `umap`), or choose pca"
        raise EvalError("a UMAP map needs the package umap-learn", fix) from error
    neighbors = min(15, len(unit) - 1)
    init = "spectral" if len(unit) > 4 else "random"
    coords = umap.UMAP(
        n_neighbors=neighbors, metric="cosine", random_state=seed, n_jobs=1, init=init
    ).fit_transform(unit.numpy())
    return torch.from_numpy(coords).float()


def _pca(unit: Tensor, seed: int) -> Tensor:
    fitted = unit if min(unit.shape) <= PCA_SIDE else unit[_subset(len(unit), PCA_SIDE, seed)]
    mean = fitted.mean(dim=0)
    centred = (fitted - mean).double()
    if len(centred) >= centred.shape[1]:
        # (D, 2) most variance first
        weights = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:].flip(1)
    else:
        scores = torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -2:].flip(1)  # (N, 2)
        weights = torch.nn.functional.normalize(centred.T @ scores, dim=0)
    weights = weights * weights.gather(0, weights.abs().argmax(dim=0, keepdim=True)).sign()
    coords = (unit - mean) @ weights.float()
    return torch.nn.functional.pad(coords, (0, 2 - coords.shape[1]))  # D = 1 has no second direction


def draw_map(
    path: Path,
    coords: Tensor,
    *,
    labels: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """A PNG of coordinates (N, 2), coloured by labels (N,); up to 20 classes are named.

    Raises:
        EvalError: matplotlib is not installed, the file cannot be written.
    """
    figure = new_figure(7, 6)
    axes = figure.subplots()
    size = max(1.0, min(20.0, 8000 / len(coords)))
    if labels is None:
        axes.scatter(
            coords[:, 0].numpy(), coords[:, 1].numpy(), s=size, c=COLOURS[0], linewidths=0, rasterized=True
        )
    else:
        from matplotlib import colormaps

        classes = labels.unique().tolist()
        colours = colormaps["tab10" if len(classes) <= 10 else "tab20"]
        for turn, label in enumerate(classes):
            shade = colours(turn % colours.N)
            across, up = coords[labels == label].T.numpy()
            axes.scatter(across, up, s=size, color=shade, linewidths=0, label=str(turn), rasterized=True)
        if len(classes) <= 20:
            legend = axes.legend(fontsize=7, markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))
            # set as text: matplotlib leaves labels out that begin with _
            for text, label in zip(legend.get_texts(), classes, strict=True):
                text.set_text(shorten(class_names[label] if class_names else str(label)))
    axes.set(xticks=[], yticks=[])
    axes.set_title(shorten(title, 80), parse_math=False)
    save_figure(figure, path)


def write_embeddings(
    path: Path,
    x: Tensor,
    coords: Tensor | None = None,
    *,
    names: Sequence[str] | None = None,
    labels: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    columns: Mapping[str, Tensor] | None = None,
    has_columns: Tensor | None = None,
) -> None:
    """A parquet row a sample: index, path, label, class_name, vector (D float32), x, y, `columns`.

    Args:
        x: (N, D) features; coords: (N, 2), e.g. from `map_2d`.
        names: N paths or names. What is not given leaves its column out.
        columns: more (N,) figures, e.g. score and times_trained. What is not finite becomes null: a score
            that was never computed.
        has_columns: (N,) bool, False where all of `columns` are null.

    Raises:
        EvalError: lengths that differ, a column named twice, a file that cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    num, dim = x.shape
    given: dict[str, Any] = {"coords": coords, "names": names, "labels": labels}
    given |= {"has_columns": has_columns, **(columns or {})}
    lengths = {name: len(values) for name, values in given.items() if values is not None}
    odd = [f"{length} {name}" for name, length in lengths.items() if length != num]
    if odd:
        fix = "give one of each for every sample"
        raise EvalError(f"there are {num} features, but {', '.join(odd)}", fix)
    table = {"index": pa.array(range(num), pa.int64())}
    if names is not None:
        table["path"] = pa.array(list(names), pa.string())
    if labels is not None:
        table["label"] = pa.array(labels.cpu().numpy(), pa.int64())
        if class_names is not None:
            table["class_name"] = pa.array([class_names[label] for label in labels.tolist()], pa.string())
    flat = x.detach().cpu().float().contiguous().numpy().reshape(-1)
    table["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(flat), dim)
    if coords is not None:
        table["x"], table["y"] = (pa.array(column) for column in coords.cpu().float().T.contiguous().numpy())
    for name, values in (columns or {}).items():
        if name in table:
            raise EvalError(f"a column named {name} is there already", "choose another name")
        present = values.isfinite() if has_columns is None else values.isfinite() & has_columns
        table[name] = pa.array(values.cpu().numpy(), mask=~present.cpu().numpy())
    with artifact(path) as file:
        pq.write_table(pa.table(table), file, compression="zstd")


# ---- small parts


def _directions(x: Tensor) -> Tensor:
    """Rows (N, D), none of zeros, of length 1; first divided by their largest entry, to stay in float32."""
    x = x[x.any(dim=1)].detach().cpu().float()
    return torch.nn.functional.normalize(x / x.abs().amax(dim=1, keepdim=True), dim=1) if len(x) else x


def _unit_rows(x: Tensor) -> Tensor:
    """Rows (N, D) divided by their length; one that is all zero stays."""
    x = x.detach().cpu().float()
    largest = x.abs().amax(dim=1, keepdim=True)
    if ((largest > 1e-12) & (largest < 1e15) | (largest == 0)).all():
        return torch.nn.functional.normalize(x, dim=1)
    # squares of these would overflow or underflow float32
    return torch.nn.functional.normalize(x / torch.where(largest > 0, largest, 1.0), dim=1)


def _subset(num: int, count: int, seed: int) -> Tensor:
    """Up to `count` different rows of `num`, ascending."""
    if count < 1:
        raise EvalError(f"{count} samples are asked for", "choose at least one")
    if count >= num:
        return torch.arange(num)
    return torch.randperm(num, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def _check_rows(x: Tensor, name: str) -> None:
    if x.ndim != 2 or len(x) < 2 or x.shape[1] < 1:
        raise EvalError(f"the {name} are {tuple(x.shape)}", "give (N, D), at least two rows")
    bad = int((~x.isfinite().all(dim=1)).sum())
    if bad:
        fix = "use another checkpoint: this encoder has diverged"
        raise EvalError(f"{bad} of {len(x)} {name} are not finite", fix)
