"""Choosing the device, describing it, and how the C library treats freed memory."""

import ctypes
from contextlib import suppress

import torch

from ssl_emp.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto`: a GPU if there is one. Raises UserError if it does not work."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # .item() fails on a meta device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        raise UserError(f"device={name} cannot be used here", "set device=auto, cpu or cuda") from error
    return device


def describe_device(device: torch.device) -> str:
    """Such as `cuda (NVIDIA H100)`, `cpu (2 threads)` or `cpu (1 thread)`."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    count = torch.get_num_threads()
    return f"{device.type} ({count} thread{'s' if count > 1 else ''})"


def keep_freed_memory() -> None:
    """Let the process keep freed memory for its next step. Works on Linux with glibc, elsewhere does nothing.

    By default glibc maps every large tensor anew and the kernel clears its pages, which costs large networks
    on the CPU a good part of a step, small ones nothing (`python -m benchmarks.step`). Call it once in a
    command, before the first tensor. The peak of resident memory becomes higher (`python -m
    benchmarks.memory`), because freed blocks do not always fit what is asked for next.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    with suppress(OSError, AttributeError):  # a C library other than glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)
