"""The keyed hash against a big-integer reference, and as a source of randomness against what chance would
give.

A hash has no seed to be unlucky with: these tests pass or fail the same way every time.
"""

import math

import pytest
import torch
from torch import Tensor

from ssl_emp.keyed import keyed_bits, keyed_uniform

BIG = 2**64


def reference_bits(*key: int) -> int:
    """SplitMix64 chained over the key, in Python's unbounded integers."""
    state = 0
    for part in key:
        state = (state + part + 0x9E3779B97F4A7C15) % BIG
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % BIG
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % BIG
        state = state ^ (state >> 31)
    return state // 4


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].item()


def test_published_vector() -> None:
    # SplitMix64's first output for seed 0
    assert keyed_bits(torch.tensor(0)).item() == 0xE220A8397B1DCDAF // 4


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1, 3**80, -(3**80)])
@pytest.mark.parametrize("epoch", [0, 7])
def test_equals_big_integer_reference(seed: int, epoch: int) -> None:
    index = torch.tensor([0, 1, 2, 59_999, 2**40, -5, 2**63 - 1, -(2**63)])
    bits = keyed_bits(seed, epoch, index, 1)
    assert bits.tolist() == [reference_bits(seed, epoch, i, 1) for i in index.tolist()]
    assert bits.dtype == torch.int64 and bits.min() >= 0 and bits.max() < 2**62


def test_ints_and_tensors_are_the_same_key() -> None:
    index = torch.arange(100)
    expected = keyed_bits(3, -4, index, 5)
    assert torch.equal(keyed_bits(torch.tensor(3), torch.tensor(-4), index, torch.tensor(5)), expected)
    assert torch.equal(keyed_bits(3, torch.tensor(-4), index.int(), 5), expected)


def test_broadcasts() -> None:
    index, view, slot = torch.arange(5).view(5, 1, 1), torch.arange(2).view(2, 1), torch.arange(3)
    bits = keyed_bits(9, index, view, slot)
    assert bits.shape == (5, 2, 3)
    assert bits[4, 1, 2].item() == reference_bits(9, 4, 1, 2)


def test_needs_an_integer_tensor() -> None:
    with pytest.raises(AssertionError):
        keyed_bits(1, 2)
    with pytest.raises(AssertionError):
        keyed_bits(1, torch.tensor(2.0))


def test_no_collisions_in_a_million_keys() -> None:
    # chance of one: 1e12 / 2^63 = 1e-7
    bits = keyed_bits(0, torch.arange(100).view(-1, 1), torch.arange(10_000))
    assert bits.unique().numel() == 1_000_000


def test_order_of_parts_matters() -> None:
    a, b = torch.arange(50).view(-1, 1), torch.arange(50)
    bits = keyed_bits(a, b)
    assert not (bits == bits.T).masked_fill(torch.eye(50, dtype=torch.bool), False).any()


def test_uniform_is_the_top_24_bits() -> None:
    u = keyed_uniform(1, torch.arange(1000))
    assert u.dtype == torch.float32
    assert torch.equal(u.double() * 2**24, (keyed_bits(1, torch.arange(1000)) // 2**38).double())


@pytest.mark.parametrize("shift", [0, 27, 54])  # low, middle and high bits
@pytest.mark.parametrize("axis", ["index", "epoch", "seed"])
def test_chi_square(axis: str, shift: int) -> None:
    count = torch.arange(2**18)
    keys: dict[str, list[int | Tensor]] = {
        "index": [0, 0, count],
        "epoch": [0, count, 17],
        "seed": [count, 0, 17],
    }
    observed = torch.bincount((keyed_bits(*keys[axis]) >> shift) & 255, minlength=256).double()
    expected = 2**18 / 256
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    # too even is wrong as well
    assert 255 - 5 * math.sqrt(2 * 255) < chi_square < 255 + 5 * math.sqrt(2 * 255)


def test_uniform_ks() -> None:
    n = 2**18
    u = keyed_uniform(123, 4, torch.arange(n)).double().sort().values
    assert 0 <= u[0] and u[-1] < 1
    assert (u - (torch.arange(n) + 0.5) / n).abs().max() < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov at 0.1 %


@pytest.mark.parametrize("part", range(5), ids=["seed", "epoch", "index", "view", "slot"])
@pytest.mark.parametrize("step", [1, 2, 256, 2**32])
def test_neighbouring_keys_are_independent(part: int, step: int) -> None:
    n = 2**16
    key: list[int | Tensor] = [5, 3, torch.arange(n), 0, 2]
    near = list(key)
    near[part] = near[part] + step
    a, b = keyed_uniform(*key), keyed_uniform(*near)
    limit = 4.5 / math.sqrt(n)
    assert abs(correlation(a, b)) < limit
    assert abs(correlation((a - 0.5) ** 2, (b - 0.5) ** 2)) < limit


def test_avalanche() -> None:
    index = torch.arange(4096)
    before = keyed_bits(0, 1, index)
    for bit in range(64):
        flipped = index ^ (1 << bit if bit < 63 else -(2**63))
        change = before ^ keyed_bits(0, 1, flipped)
        rates = torch.stack([(change >> out & 1).double().mean() for out in range(62)])
        # 64 x 62 rates of 4096 fair coins each: sd 1/128
        assert (rates - 0.5).abs().max() < 5.5 / 128, f"input bit {bit}"


def test_touches_no_global_generator() -> None:
    state = torch.random.get_rng_state()
    keyed_uniform(1, torch.arange(10))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.slow
def test_compiled_is_the_same() -> None:
    index = torch.arange(1000)
    compiled = torch.compile(keyed_bits, fullgraph=True)
    for epoch in range(3):
        assert torch.equal(compiled(-3, torch.tensor(epoch), index, 5), keyed_bits(-3, epoch, index, 5))


@pytest.mark.gpu
def test_gpu_is_the_same() -> None:
    index = torch.arange(-1000, 1000)
    assert torch.equal(keyed_bits(-3, 2, index.cuda(), 5).cpu(), keyed_bits(-3, 2, index, 5))
    assert torch.equal(keyed_uniform(-3, 2, index.cuda(), 5).cpu(), keyed_uniform(-3, 2, index, 5))
