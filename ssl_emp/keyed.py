"""Random numbers as a function of a key (seed, epoch, index, ...): equal in any batch, rank or restart."""

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014).
_GAMMA = 0x9E3779B97F4A7C15
_FACTOR_1 = 0xBF58476D1CE4E5B9
_FACTOR_2 = 0x94D049BB133111EB
_MASK64 = (1 << 64) - 1


def keyed_bits(*key: int | Tensor) -> Tensor:
    """Hash a key to 62 random bits, bit for bit the same on CPU and GPU, eager and compiled.

    An int and a tensor of the same value give the same bits. Ints are hashed on the host, without a tensor.
    Put them and small tensors first: each part costs a pass over the broadcast shape of the parts so far.
    Inside `torch.compile` an int must be constant; pass one that changes (an epoch) as a 0-d tensor.

    Args:
        key: ints (taken modulo 2^64) and int64 tensors that broadcast; at least one tensor. Order matters.

    Returns:
        int64 tensor of the broadcast shape, uniform in [0, 2^62).
    """
    state: int | Tensor = 0
    for part in key:
        if isinstance(part, Tensor):
            assert not part.is_floating_point(), f"key parts are integers, got {part.dtype}"
            state = _mix(part.long() + (_signed(state) if isinstance(state, int) else state))
        elif isinstance(state, Tensor):
            state = _mix(state + _signed(part))
        else:
            state = _mix_int(state + part)
    assert isinstance(state, Tensor), "at least one part of the key must be a tensor"
    return _shifted(state, 2)


def keyed_uniform(*key: int | Tensor) -> Tensor:
    """Hash a key to a float32 uniform in [0, 1): the top 24 bits of `keyed_bits`, so every value is exact."""
    return (keyed_bits(*key) >> 38).float() * 2.0**-24


def seed_generators(device: torch.device, *key: int) -> None:
    """Let torch's own generators, of the CPU and of `device`, draw what this key says.

    For what a network draws by itself, such as dropout and dropped paths. A step is then a function of its
    key: a resumed run draws what the uninterrupted one does, and nothing has to be saved. Costs microseconds
    and waits for no device.
    """
    state = 0
    for part in key:
        state = _mix_int(state + part)
    seed = state >> 1  # of the CPU's generator 32 bits count, and those of neighbouring keys have to differ
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _mix(state: Tensor) -> Tensor:
    state = state + _signed(_GAMMA)
    state = (state ^ _shifted(state, 30)) * _signed(_FACTOR_1)
    state = (state ^ _shifted(state, 27)) * _signed(_FACTOR_2)
    return state ^ _shifted(state, 31)


def _mix_int(state: int) -> int:
    state = (state + _GAMMA) & _MASK64
    state = ((state ^ state >> 30) * _FACTOR_1) & _MASK64
    state = ((state ^ state >> 27) * _FACTOR_2) & _MASK64
    return state ^ state >> 31


def _shifted(state: Tensor, bits: int) -> Tensor:
    return (state >> bits) & ((1 << (64 - bits)) - 1)  # int64's >> copies the sign bit: mask it


def _signed(value: int) -> int:
    return ((value + (1 << 63)) & _MASK64) - (1 << 63)  # the int64 with the same 64 bits
