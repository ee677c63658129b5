"""What a step costs where the size of the views changes: for the time left, and for what pruning saved."""

from collections.abc import Mapping, Sequence


def pace_of(
    seconds: Mapping[str, float], steps: Sequence[int], sizes: Sequence[int], done: int
) -> dict[int, tuple[int, float]]:
    """Side of the views -> steps that were made with it, and the seconds that these took together.

    Args:
        seconds: of training: `training` together, and `training_16px` of views of 16 pixels where there are
            several sizes.
        steps, sizes: of every epoch of the run.
        done: steps that were made, of all epochs.
    """
    made = dict.fromkeys(sizes, 0)
    for size, count in zip(sizes, steps, strict=True):
        made[size] += min(count, done)
        done -= min(count, done)
    together = seconds["training"]
    return {size: (count, seconds.get(f"training_{size}px", together)) for size, count in made.items()}


def seconds_per_step(done: Mapping[int, tuple[int, float]], size: int) -> float:
    """Seconds of a training step with views of `size` pixels a side: the mean of those that were made.

    Of a size that was not trained on yet it is that of the nearest one, times the ratio of their pixels. A
    part of a step does not depend on the size (draws, optimizer, starting kernels), so from smaller to larger
    views this says too much rather than too little.

    Args:
        done: size -> steps that were made and the seconds that they took together; steps of 0 are none.
    """
    made = {other: seconds / steps for other, (steps, seconds) in done.items() if steps}
    nearest = min(made, key=lambda other: (abs(other - size), other))
    return made[nearest] * (size / nearest) ** 2


def seconds_of(done: Mapping[int, tuple[int, float]], steps: Sequence[int], sizes: Sequence[int]) -> float:
    """Seconds of training that epochs of so many steps take, with views of these sizes."""
    left: dict[int, int] = {}
    for count, size in zip(steps, sizes, strict=True):
        left[size] = left.get(size, 0) + count
    return sum(count * seconds_per_step(done, size) for size, count in left.items() if count)
