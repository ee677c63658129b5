"""Columns of many samples in little room: typed arrays as base64, and names by what they share."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

KINDS: dict[str, type[np.number[Any]]] = {"u1": np.uint8, "u2": np.uint16, "i4": np.int32, "f4": np.float32}


def packed(values: np.ndarray) -> dict[str, Any]:
    """(N,) numbers as {"kind": one of KINDS, "data": base64 of little-endian values}, the smallest that holds
    whole numbers; others, and what is beyond 32 bits, as float32, with NaN where a number is not finite.
    """
    kind = "f4"
    if np.issubdtype(values.dtype, np.integer):
        low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
        ends = {"u1": (0, 2**8), "u2": (0, 2**16), "i4": (-(2**31), 2**31)}
        kind = next((name for name, (first, end) in ends.items() if first <= low and high < end), "f4")
    if kind == "f4":
        with np.errstate(over="ignore"):  # beyond float32: as if it had not been known
            values = values.astype(np.float32)
        values = np.where(np.isfinite(values), values, np.float32(np.nan))
    data = np.ascontiguousarray(values, dtype=np.dtype(KINDS[kind]).newbyteorder("<")).tobytes()
    return {"kind": kind, "data": base64.b64encode(data).decode()}


def front_coded(names: Sequence[str]) -> dict[str, Any]:
    """Names (no line breaks in them) as how many characters each shares with the one before, and its rest.

    Names of a data set mostly differ in a number at the end. Characters are counted as JavaScript does, in
    units of UTF-16, and a character of two units is not cut.
    """
    shared, rests, before = np.zeros(len(names), np.int64), [], ""
    for row, name in enumerate(names):
        count = 0
        # without characters beyond 16 bits, Python and JavaScript count alike
        if name and before and max(name) <= "\uffff":
            count = _common(before, name)
        shared[row], before = count, name if max(name, default="") <= "\uffff" else ""
        rests.append(name[count:])
    return {"shared": packed(shared), "rests": "\n".join(rests)}


def _common(a: str, b: str) -> int:
    """Length of the longest common beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def histogram(values: np.ndarray, most: int = 60) -> dict[str, Any]:
    """Counts of (N,) whole numbers >= 0: {"low": first value, "width": values a bar, "counts": [...]}."""
    if not len(values):
        return {"low": 0, "width": 1, "counts": []}
    low, high = int(values.min()), int(values.max())
    width = -(-(high - low + 1) // most)
    bars = np.bincount((values.astype(np.int64) - low) // width)
    return {"low": low, "width": width, "counts": bars.tolist()}
