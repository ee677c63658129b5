"""The device by its name, and memory that stays with the process."""

import platform
import subprocess
import sys

import pytest
import torch

from ssl_emp.device import describe_device, pick_device
from ssl_emp.errors import UserError

ALLOCATE = """
import resource, torch
from ssl_emp.device import keep_freed_memory

def faults():
    seen = []
    for _ in range(10):
        torch.ones(10_000_000)  # 40 MB, freed at once
        seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return min(after - before for before, after in zip(seen[1:], seen[2:]))

returned = faults()
keep_freed_memory()
print(returned, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.whole
def test_freed_memory_is_used_again() -> None:
    """Page faults of a tensor of 40 MB after one like it: none, where by default the kernel hands out every
    page again.

    The fewest of eight tensors: a kernel short of memory takes the pages of one back now and then (DAMON).
    """
    said = subprocess.run([sys.executable, "-c", ALLOCATE], check=True, capture_output=True, text=True).stdout
    returned, kept = map(int, said.split())
    assert kept < 100 < returned, said


def test_devices_by_name() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    number = torch.get_num_threads()
    said = f"cpu ({number} thread{'s' if number > 1 else ''})"
    assert describe_device(torch.device("cpu")) == said
    for name in ("meta", "no such device", "cuda:99"):
        with pytest.raises(UserError, match="cannot be used here. fix: set device="):
            pick_device(name)
