"""linear_eval.diagnose against closed forms, brute force over pairs, and what other programs read from its
files.
"""

import math
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy.special import hyp0f1
from torch import Tensor

from linear_eval import EvalError
from linear_eval.artifacts import COLOURS
from linear_eval.diagnose import (
    alignment,
    diagnose,
    draw_map,
    draw_neighbors,
    effective_rank,
    feature_std,
    map_2d,
    nearest_rows,
    uniformity,
    uniformity_of_sphere,
    verdict,
    write_embeddings,
)


def gaussian(num: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def with_singular_values(num: int, values: list[float], seed: int = 0) -> Tensor:
    """(num, len(values)) of random directions and these singular values."""
    left = torch.linalg.qr(gaussian(num, len(values), seed).double()).Q
    right = torch.linalg.qr(gaussian(len(values), len(values), seed + 1).double()).Q
    return (left * torch.tensor(values, dtype=torch.float64)) @ right.T


# ---- figures


def test_directions_spread_evenly_have_the_known_figures() -> None:
    found = diagnose(7 * gaussian(4000, 32))
    assert found.feature_std == pytest.approx(1 / math.sqrt(32), rel=0.01)
    assert found.effective_rank == pytest.approx(32, rel=0.01)
    assert found.uniformity == pytest.approx(found.uniformity_even, abs=0.01)
    assert verdict(found)[0].startswith("features are spread out")


def test_one_vector_for_all_images_is_a_collapse() -> None:
    found = diagnose(gaussian(1, 16).repeat(50, 1))
    assert found.feature_std == pytest.approx(0, abs=1e-6)
    assert found.effective_rank == pytest.approx(1, abs=0.01)
    assert found.uniformity == pytest.approx(0, abs=1e-5)
    assert found.num_constant == 16
    assert verdict(found)[0].startswith("features are collapsed")


def test_all_zero_features_are_said_not_a_crash() -> None:
    found = diagnose(torch.zeros(20, 8))
    assert (found.num_zero, found.effective_rank, found.feature_std, found.uniformity) == (20, 0, 0, 0)
    assert "20 of 20 features are all zero" in "\n".join(verdict(found))
    some = torch.cat([torch.zeros(5, 8), gaussian(200, 8)])
    assert diagnose(some).num_zero == 5
    assert feature_std(some) == feature_std(some[5:]) and uniformity(some) == uniformity(some[5:])


@pytest.mark.parametrize("shape", [(40, 5), (5, 40)])
def test_effective_rank_of_known_singular_values(shape: tuple[int, int]) -> None:
    values = [8.0, 4.0, 2.0, 1.0, 1.0]
    x = with_singular_values(40, values)
    x = x if shape == (40, 5) else x.T
    p = [value / 16 + 1e-7 for value in values]
    assert effective_rank(x) == pytest.approx(
        math.exp(-sum(share * math.log(share) for share in p)), rel=1e-9
    )
    assert effective_rank(with_singular_values(40, [1.0] * 5)) == pytest.approx(5, rel=1e-4)
    assert effective_rank(with_singular_values(40, [1.0, 1.0, 0, 0, 0])) == pytest.approx(2, rel=1e-4)
    assert effective_rank(x.float() * 1e-3) == pytest.approx(effective_rank(x), rel=1e-4)  # no unit


def test_alignment_and_uniformity_against_a_double_loop() -> None:
    a, b = gaussian(30, 6, 1), gaussian(30, 6, 2)
    unit = [[row / np.linalg.norm(row) for row in x.double().numpy()] for x in (a, b)]
    for power in (1, 2):
        expected = sum(np.linalg.norm(u - v) ** power for u, v in zip(*unit, strict=True)) / 30
        assert alignment(a, b, power=power) == pytest.approx(expected, rel=1e-6)
    assert alignment(a, 3 * a) == pytest.approx(0, abs=1e-6)
    for t in (2, 0.5):
        pairs = [
            math.exp(-t * np.linalg.norm(unit[0][i] - unit[0][j]) ** 2) for i in range(30) for j in range(i)
        ]
        assert uniformity(a, t=t) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-6)


def test_uniformity_over_several_chunks_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(100, 6)
    whole = uniformity(x)
    monkeypatch.setattr("linear_eval.diagnose.PAIR_CHUNK", 7)
    assert uniformity(x) == pytest.approx(whole, rel=1e-6)
    assert whole == pytest.approx(
        torch.pdist(torch.nn.functional.normalize(x)).square().mul(-2).exp().mean().log().item(), rel=1e-5
    )


@pytest.mark.parametrize("dim", [2, 3, 128, 2048])
def test_uniformity_of_the_sphere_is_the_hypergeometric_function(dim: int) -> None:
    for t in (0.5, 2):
        assert uniformity_of_sphere(dim, t=t) == pytest.approx(
            math.log(hyp0f1(dim / 2, t * t)) - 2 * t, rel=1e-9
        )


def test_huge_and_tiny_features_have_the_figures_of_their_directions() -> None:
    x = gaussian(200, 8)
    for scale in (1e-25, 1e25):
        assert feature_std(x * scale) == pytest.approx(feature_std(x), rel=1e-4)
        assert uniformity(x * scale) == pytest.approx(uniformity(x), rel=1e-4)


def test_a_common_direction_and_few_directions_are_named() -> None:
    shifted = verdict(diagnose(gaussian(500, 64) + 4))
    assert shifted[0].startswith("features share a strong common direction")
    flat = gaussian(500, 2) @ gaussian(2, 64)
    assert any(line.startswith("few directions are used") for line in verdict(diagnose(flat)))
    views = (gaussian(50, 64), gaussian(50, 64, 5))
    assert diagnose(gaussian(500, 64), views=views).alignment == pytest.approx(2, abs=0.1)
    assert any(line.startswith("alignment") for line in verdict(diagnose(gaussian(500, 64), views=views)))


def test_a_subset_is_drawn_by_seed() -> None:
    x = gaussian(500, 4)
    assert (
        diagnose(x, max_samples=100) == diagnose(x, max_samples=100) != diagnose(x, max_samples=100, seed=1)
    )
    assert diagnose(x, max_samples=100).num_samples == 100


@pytest.mark.parametrize(
    ("x", "views", "message"),
    [
        (torch.zeros(1, 4), None, "at least two rows"),
        (torch.full((3, 4), torch.nan), None, "3 of 3 features are not finite"),
        (torch.ones(3, 4), (torch.ones(3, 4), torch.ones(2, 4)), "two views of the same images"),
    ],
)
def test_bad_features_are_one_clear_line(
    x: Tensor, views: tuple[Tensor, Tensor] | None, message: str
) -> None:
    with pytest.raises(EvalError, match=message):
        diagnose(x, views=views)


# ---- neighbours


def test_nearest_rows_against_brute_force_ties_by_row() -> None:
    x = gaussian(40, 5)
    x[30] = x[7]  # a tie for every query
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    for query, row in zip([3, 7, 39], nearest_rows(x, torch.tensor([3, 7, 39]), 6).tolist(), strict=True):
        others = [i for i in range(40) if i != query]
        assert row == sorted(others, key=lambda i: (-round((unit[query] @ unit[i]).item(), 6), i))[:6]
    with pytest.raises(EvalError, match="choose 1 to 39"):
        nearest_rows(x, torch.tensor([0]), 40)


def pixels_by_colour(path: Path) -> dict[str, int]:
    with Image.open(path) as image:
        colours, counts = np.unique(
            np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0, return_counts=True
        )
    return {f"#{r:02X}{g:02X}{b:02X}": int(count) for (r, g, b), count in zip(colours, counts, strict=True)}


def test_the_grid_marks_neighbours_of_the_same_and_of_another_class(tmp_path: Path) -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0]])
    pixels = torch.full((4, 3, 8, 8), 200, dtype=torch.uint8)
    labels = torch.tensor([0, 0, 1, 1])
    path = tmp_path / "new" / "grid.png"
    rows = draw_neighbors(
        path, pixels, x, queries=torch.tensor([0]), labels=labels, class_names=["cat", "dog"], num_neighbors=2
    )
    assert rows.tolist() == [[1, 2]]
    colours = pixels_by_colour(path)
    same, other = colours[COLOURS[0]], colours[COLOURS[1]]
    # a frame 3 pixels wide around 72 x 72; the other one has a cross too
    assert same == 2 * 3 * (72 + 3) * 2 and other > same
    assert [item.name for item in path.parent.iterdir()] == ["grid.png"]

    draw_neighbors(path, pixels, x, num_queries=2, num_neighbors=3)  # no labels: nothing is marked
    assert COLOURS[1] not in pixels_by_colour(path)
    with pytest.raises(EvalError, match="3 images, 4 features"):
        draw_neighbors(path, pixels[:3], x)


# ---- map and table


@pytest.mark.parametrize("shape", [(50, 6), (12, 40)])
def test_pca_equals_the_svd_and_signs_are_fixed(shape: tuple[int, int]) -> None:
    x = gaussian(*shape)
    coords = map_2d(x)
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    left, values, right = torch.linalg.svd(unit - unit.mean(dim=0), full_matrices=False)
    expected = left[:, :2] * values[:2]
    for column in range(2):
        sign = right[column, right[column].abs().argmax()].sign()
        torch.testing.assert_close(coords[:, column].double(), sign * expected[:, column], atol=1e-5, rtol=0)
    assert torch.equal(map_2d(x), coords)


def test_pca_of_more_rows_and_columns_than_it_decomposes_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(400, 3) * torch.tensor([5.0, 2.0, 0.1]) @ gaussian(3, 120, 1) + 0.01 * gaussian(400, 120, 2)
    whole = map_2d(x)
    monkeypatch.setattr("linear_eval.diagnose.PCA_SIDE", 100)
    part = map_2d(x)
    for column in range(2):
        assert torch.corrcoef(torch.stack([whole[:, column], part[:, column]]))[0, 1] > 0.98
    assert map_2d(torch.ones(5, 3)).abs().max() < 1e-5 and map_2d(torch.ones(5, 1)).shape == (5, 2)


def test_umap_is_an_extra_with_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(EvalError, match=r"pip install umap-learn \(extra `umap`\), or choose pca"):
        map_2d(gaussian(10, 3), method="umap")


def test_umap_keeps_clusters_apart_and_repeats_by_seed() -> None:
    pytest.importorskip("umap")
    x = torch.cat([gaussian(40, 8) + 8, gaussian(40, 8, 1) - 8])
    coords = map_2d(x, method="umap", seed=3)
    assert coords.shape == (80, 2) and torch.equal(coords, map_2d(x, method="umap", seed=3))
    distances = torch.cdist(coords, coords) + 1e9 * torch.eye(80)
    nearest = distances.argmin(dim=1)
    assert ((nearest < 40) == (torch.arange(80) < 40)).all()
    assert map_2d(x[:3], method="umap").shape == (3, 2)


def test_the_map_is_drawn_and_matplotlib_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coords, labels = gaussian(30, 2), torch.arange(30) % 3
    for path, given in ((tmp_path / "a.png", None), (tmp_path / "b.png", labels)):
        draw_map(path, coords, labels=given, class_names=["a", "b", "c"], title="a map")
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width > 500
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EvalError, match="pip install matplotlib"):
        draw_map(tmp_path / "c.png", coords)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_pandas_and_pyarrow_read_what_was_written(tmp_path: Path) -> None:
    x, coords = gaussian(6, 5), gaussian(6, 2, 1)
    labels, score = torch.tensor([0, 1, 0, 1, 0, 1]), torch.tensor([0.5, math.inf, -1.0, 2.0, 0.0, 0.25])
    path = tmp_path / "embeddings.parquet"
    write_embeddings(
        path,
        x,
        coords,
        names=[f"cat/{i}.png" for i in range(6)],
        labels=labels,
        class_names=["cat", "dog"],
        columns={"score": score, "times_trained": torch.arange(6)},
    )
    frame = pytest.importorskip("pandas").read_parquet(path)
    assert list(frame) == [
        "index",
        "path",
        "label",
        "class_name",
        "vector",
        "x",
        "y",
        "score",
        "times_trained",
    ]
    np.testing.assert_array_equal(np.stack(frame["vector"].tolist()), x.numpy())
    np.testing.assert_array_equal(frame[["x", "y"]].to_numpy(), coords.numpy())
    assert frame["class_name"].tolist() == ["cat", "dog"] * 3 and frame["times_trained"].tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]
    assert frame["score"].isna().tolist() == [False, True, False, False, False, False]  # never scored
    schema = pq.read_schema(path)
    assert (
        str(schema.field("vector").type) == "fixed_size_list<item: float>[5]"
        or schema.field("vector").type.list_size == 5
    )
    assert [item.name for item in tmp_path.iterdir()] == ["embeddings.parquet"]


def test_rows_without_columns_are_null_and_whole_numbers_stay_whole(tmp_path: Path) -> None:
    columns = {"score": torch.tensor([1.0, 2.0, math.inf]), "times_trained": torch.tensor([4, 5, 6])}
    has = torch.tensor([True, False, True])
    write_embeddings(tmp_path / "e.parquet", gaussian(3, 2), gaussian(3, 2), columns=columns, has_columns=has)
    table = pq.read_table(tmp_path / "e.parquet")
    assert table["score"].to_pylist() == [1.0, None, None] and table["times_trained"].to_pylist() == [
        4,
        None,
        6,
    ]
    with pytest.raises(EvalError, match="2 has_columns"):
        write_embeddings(
            tmp_path / "f.parquet", gaussian(3, 2), gaussian(3, 2), columns=columns, has_columns=has[:2]
        )


def test_a_table_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    x, coords = gaussian(4, 3), gaussian(4, 2)
    path = tmp_path / "embeddings.parquet"
    write_embeddings(path, x, coords)
    before = path.read_bytes()
    with pytest.raises(EvalError, match="3 names"):
        write_embeddings(path, x, coords, names=["a", "b", "c"])
    with pytest.raises(EvalError, match="a column named x"):
        write_embeddings(path, x, coords, columns={"x": torch.zeros(4)})
    assert path.read_bytes() == before and [item.name for item in tmp_path.iterdir()] == [path.name]
    (tmp_path / "file").write_text("")
    with pytest.raises(EvalError, match="cannot write"):
        write_embeddings(tmp_path / "file" / "embeddings.parquet", x, coords)
