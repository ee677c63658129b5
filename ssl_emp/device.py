"""Which device, and its name for people."""

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
