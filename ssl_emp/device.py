"""Which device, its name for people, and how the C library treats freed memory."""

import ctypes
from contextlib import suppress

import torch

from ssl_emp.errors import UserError


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises UserError for a device that cannot hold a tensor here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a meta device takes the tensor, but has no value to give
    except (RuntimeError, AssertionError) as error:  # torch built without cuda asserts
        raise UserError(f"device={name} cannot be used here", "set device=auto, cpu or cuda") from error
    return device


def describe_device(device: torch.device) -> str:
    """Such as `cuda (NVIDIA H100)` or `cpu (2 threads)`."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({torch.get_num_threads()} threads)"


def keep_freed_memory() -> None:
    """Let the process keep freed memory for its next step instead of giving it back (Linux with glibc;
    elsewhere nothing).

    Out of the box glibc maps every large tensor anew and the kernel clears its pages, which costs large
    networks on the CPU a good part of a step and small ones nothing (`python -m benchmarks.step`). For
    scripts, once, before the first tensor. The price is a higher peak of resident memory (`python -m
    benchmarks.memory`): what is kept is not always of the size that is asked for.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)
