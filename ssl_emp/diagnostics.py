"""What a pruned run looks like from inside, and plain words where it goes wrong: the failure signatures of
EMP's paper.

`diagnose` turns per-sample tensors into the figures of an epoch, `findings` turns figures into warnings that
name the key to turn, `next_to_say` keeps them from repeating themselves. The tensor functions are pure, give
0-d tensors and do not wait for a GPU; `diagnose` reads twice. Letters: N samples, K trained in an epoch, C
classes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_emp.policies import RANKING
from ssl_emp.run.report import rank_correlation

IDLE_EPOCHS = 8  # training on a random 70 % skips a sample that long once in 15,000 times
# below this many samples a share or a correlation is off by more than 0.05 (1 / sqrt(n)) by chance alone
MIN_SAMPLES = 400
# a class is judged from this many expected among the kept: chance then moves its ratio by 0.14, the worst of
# 1,000 classes by 0.45
MIN_EXPECTED = 50
# the kept samples' mean true score lies above the average by sqrt(reliability) of what an exact ranking
# reaches: here, a third
CHANCE_RELIABILITY = 0.1
# two uncorrelated terms with this ratio of spreads: the smaller one makes 4 % of the score's variance
DROWNED = 5.0
ROTATION = 0.2  # of the way from the overlap that chance gives to the least one possible
IDLE_SHARE = 0.1  # and twice what a random choice of this size leaves out; a ranking is meant to leave some
NOISE_EXCESS = 0.15  # of the share in the data, and three standard errors
# a class kept at twice its share, or at half of it; the paper calls some imbalance expected
CLASS_RATIO = 2.0
REPEAT_EPOCHS = 10
CLEARLY_WORSE = 1.5  # times the severity that was said last


def kept_overlap(trained: Tensor, trained_before: Tensor) -> Tensor:
    """Share of the now trained that were trained the epoch before, (N,) bool x 2 -> 0-d float64.

    Two independent draws give `trained_before.mean()`, the share that was trained then.
    """
    return (trained & trained_before).sum() / trained.sum().clamp(min=1).double()


def gini(times_trained: Tensor) -> Tensor:
    """Gini coefficient of (N,) counts, 0-d float64: 0 all equal, (N - 1) / N one sample has everything; 0
    where all are 0.

    It is the mean difference of all N² pairs over twice the mean; exact in O(N log N) from the sorted values.
    """
    ordered = times_trained.sort().values.double()
    # (N,)
    weight = 2 * torch.arange(len(ordered), device=ordered.device, dtype=torch.float64) + 1 - len(ordered)
    return (weight * ordered).sum() / (len(ordered) * ordered.sum()).clamp(min=1)


def times_histogram(times_trained: Tensor, epochs: int) -> Tensor:
    """How many samples were trained 0, 1, .. `epochs` times, (N,) -> (epochs + 1,) int64. Waits for a GPU:
    for the end of a run.
    """
    return torch.bincount(times_trained, minlength=epochs + 1)


def share_not_trained_for(last_trained: Tensor, epoch: int, num_epochs: int) -> Tensor:
    """Share of the samples that none of the last `num_epochs` epochs trained on, `epoch` included, 0-d
    float64.

    Args:
        last_trained: (N,) epoch of the last training, counted from 0; -1 = never. 0 until the run is
            `num_epochs` old.
    """
    return (epoch - last_trained >= num_epochs).double().mean()


def class_balance(trained: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """How a kept set stands to the classes of the data.

    Args:
        trained: (N,) bool, at least one True.
        labels: (N,) int64 in 0 .. num_classes - 1.

    Returns:
        (C,) each class's share among the trained over its share in the data, NaN where the data has none of
        it;
        (C,) how many of it a random choice of this size would hold;
        0-d entropy of the classes among the trained over the log of the number of classes in the data, 1 =
        even (and for one class).
    """
    empty = torch.zeros(num_classes, dtype=torch.int64, device=labels.device)
    in_data = empty.index_add(0, labels, torch.ones_like(labels)).double()
    in_kept = empty.index_add(0, labels, trained.long()).double()
    expected = in_data * (in_kept.sum() / in_data.sum())
    share = in_kept / in_kept.sum()
    present = (in_data > 0).sum()
    entropy = -torch.special.xlogy(share, share).sum() / present.log()
    return in_kept / expected, expected, torch.where(present > 1, entropy, 1.0)


def noisy_share(trained: Tensor, is_noisy: Tensor) -> Tensor:
    """Share of the trained whose label is known to be wrong, (N,) bool x 2 -> 0-d float64."""
    return (trained & is_noisy).sum() / trained.sum().clamp(min=1).double()


def diagnose(
    epoch: int,
    *,
    times_trained: Tensor,
    last_trained: Tensor,
    last_trained_before: Tensor | None = None,
    scores: Tensor | None = None,
    scores_before: Tensor | None = None,
    fresh: Tensor | None = None,
    labels: Tensor | None = None,
    num_classes: int = 0,
    is_noisy: Tensor | None = None,
) -> dict[str, float]:
    """The figures of `epoch`, once it has trained on something; all tensors (N,) on one device. Reads from it
    twice.

    Args:
        epoch: counted from 0.
        times_trained, last_trained: of every sample, this epoch included; last_trained -1 = never.
            Trained now is `last_trained == epoch`.
        last_trained_before: the same as the epoch began. None where this epoch or the one before was a
            full one: then the overlap says nothing.
        scores, scores_before: from each sample's last observation, as the epoch ended and as it began;
            +inf = never scored. Running means would do, but they resemble themselves.
        fresh: bool, the samples observed anew in both epochs, each time with other views. The others'
            scores agree with themselves, which would pass for reliability. Where only kept samples are
            observed, these are the high scores alone, and a narrow range lowers a correlation: at s = 0.7 one
            of 0.2 shows as 0.1.
        labels, num_classes: (N,) int64, where there are labels.
        is_noisy: bool, where wrong labels are known.

    Returns:
        Without those that cannot be known: `times_gini`, `times_p10`, `times_p50`, `times_p90` (deciles of
        times trained),
        `idle_share` (not trained for IDLE_EPOCHS epochs), `kept_overlap` and `kept_overlap_chance`,
        `score_repeat` (rank correlation
        of the two scores over the `score_repeat_samples` fresh ones), `class_ratio_min`, `class_min`,
        `class_ratio_max`, `class_max`
        (of the classes that are large enough to judge: ratio and number), `class_entropy`, `noisy_kept`,
        `noisy_data`.
    """
    trained = last_trained == epoch
    ordered = times_trained.sort().values
    repeated: dict[str, float] = {}
    figures = {
        "times_gini": gini(times_trained),
        "idle_share": share_not_trained_for(last_trained, epoch, IDLE_EPOCHS),
    }
    figures |= {
        f"times_p{percent}": ordered[round(percent / 100 * (len(ordered) - 1))] for percent in (10, 50, 90)
    }
    if last_trained_before is not None:
        trained_before = last_trained_before == epoch - 1
        figures |= {
            "kept_overlap": kept_overlap(trained, trained_before),
            "kept_overlap_chance": trained_before.double().mean(),
        }
    if scores is not None and scores_before is not None and fresh is not None:
        # waits for a GPU: its size is not known
        index = (fresh & scores.isfinite() & scores_before.isfinite()).nonzero().squeeze(1)
        repeated = {"score_repeat_samples": float(len(index))}
        if len(index) > 1:
            figures["score_repeat"] = rank_correlation(scores[index], scores_before[index])
    if labels is not None:
        ratio, expected, figures["class_entropy"] = class_balance(trained, labels, num_classes)
        judged = expected >= MIN_EXPECTED
        figures["class_ratio_min"], figures["class_min"] = torch.where(judged, ratio, torch.inf).min(0)
        figures["class_ratio_max"], figures["class_max"] = torch.where(judged, ratio, -torch.inf).max(0)
    if is_noisy is not None:
        figures |= {"noisy_kept": noisy_share(trained, is_noisy), "noisy_data": is_noisy.double().mean()}
    values = torch.stack([figure.double() for figure in figures.values()]).tolist()
    known = {name: value for name, value in zip(figures, values, strict=True) if math.isfinite(value)}
    if "class_ratio_min" not in known:  # no class is large enough: nor is there a worst one
        known = {name: value for name, value in known.items() if name not in ("class_min", "class_max")}
    return known | repeated


@dataclass(frozen=True)
class Finding:
    """One thing that is off: what kind, how bad (1 = at the threshold, more is worse), and a line for a
    person.
    """

    kind: str
    severity: float
    line: str


def findings(
    figures: Mapping[str, float | None],
    *,
    num_samples: int,
    policy: str,
    beta: float,
    loss_weight: float = 1.0,
    memory: str = "raw",
    ema: float = 1.0,
    adjust: bool = False,
    foresees: bool = False,
    explore: float = 0.0,
    redraw_every: int = 1,
    class_names: Sequence[str] | None = None,
) -> list[Finding]:
    """What is off in a pruned epoch, the gravest first; nothing for sets below MIN_SAMPLES. Not for full
    epochs.

    Args:
        figures: of `diagnose`, `kept_share` (trained of N), and where known `std_loss`, `std_beta_memory`
            and `rank_correlation` of the two terms, `score_reliability` of the score that ranks and
            `draw_reliability` of one observation (0 .. 1), and `foresight`, the rank correlation of what was
            expected of the coming draws with what they were.
        policy, beta, loss_weight, memory, ema, adjust, explore, redraw_every: the values of the keys
            prune.* in this epoch. Policies that do not rank are judged by frequency and class balance only.
        foresees: what ranks is what is expected of the coming draw, and is judged by `foresight`: the
            sample's part may be noise.
        class_names: for the line; None: numbers.
    """
    known = {name: value for name, value in figures.items() if value is not None}
    if num_samples < MIN_SAMPLES:
        return []
    kept_share = known["kept_share"]
    memory_ratio = 1.0  # spread of the memory term over the loss's
    if policy == "emp" and beta > 0 and loss_weight != 0 and known.get("std_loss"):
        memory_ratio = known["std_beta_memory"] / (abs(loss_weight) * known["std_loss"])
    found: list[Finding] = []
    ranks = policy in RANKING
    mix = "another prune.indices" if policy == "indices" else "a smaller prune.fraction"
    if ranks:
        mix = f"prune.explore={min(2 * explore, 1) or 0.1:.2g}"
    remember = "prune.policy=emp"
    if policy == "emp":  # more of a term that decides already would change nothing
        remember = mix if memory_ratio > DROWNED else f"prune.beta={2 * beta or 1:.2g}"

    if ranks:
        found += _ranking_is_chance(known, ema, adjust, foresees)
        found += _term_is_drowned(known, memory_ratio, beta, memory)
        found += _kept_sets_rotate(known, kept_share, num_samples, remember)
    # a subset that stays was asked to leave the rest untrained
    if policy != "indices" and (policy != "random" or redraw_every == 1):
        found += _samples_are_idle(known, kept_share, mix)
    if ranks or policy in ("infobatch", "scan"):
        found += _noise_is_kept(known, kept_share, num_samples, remember)
    return found + _classes_are_uneven(known, mix, class_names)


def next_to_say(
    found: Sequence[Finding], said: Mapping[str, tuple[int, float]], epoch: int
) -> Finding | None:
    """The one finding to tell in `epoch`, or None. The caller then notes `said[finding.kind] = (epoch,
    finding.severity)`.

    One a line, one line an epoch: a kind that was never told goes first; one that was is told again after
    REPEAT_EPOCHS epochs, or at once where it became CLEARLY_WORSE.
    """

    def due(finding: Finding) -> bool:
        told, severity = said.get(finding.kind, (-math.inf, 0.0))
        return epoch - told >= REPEAT_EPOCHS or finding.severity >= CLEARLY_WORSE * severity

    return min(filter(due, found), key=lambda finding: finding.kind in said, default=None)


def _ranking_is_chance(known: Mapping[str, float], ema: float, adjust: bool, foresees: bool) -> list[Finding]:
    evidence = []
    if "score_repeat" in known:
        samples = f"{known['score_repeat_samples']:,.0f} samples"
        evidence += [f"scores of consecutive epochs correlate by {known['score_repeat']:.2f} ({samples})"]
    if "kept_overlap" in known:
        evidence += [
            (
                f"kept sets overlap by {known['kept_overlap']:.0%} where chance gives "
                f"{known['kept_overlap_chance']:.0%}"
            )
        ]
    judges = {
        "score_reliability": "the score's reliability is",
        "draw_reliability": "two draws of the score correlate by",
    }
    if foresees:
        judges = {"foresight": "what is expected of a draw correlates with what it is by"} | judges
    for name, words in judges.items():
        if name in known:
            reliability, evidence = known[name], [f"{words} {known[name]:.2f}", *evidence]
            break
    else:
        # where a running mean ranks, this proves nothing: means resemble themselves, and single observations
        # do not rank
        if ema < 1 or known.get("score_repeat_samples", 0) < MIN_SAMPLES:
            return []
        reliability = known["score_repeat"]
        # not by chance: training turns the order about, see _kept_sets_rotate
        if reliability <= -CHANCE_RELIABILITY:
            return []
    if reliability >= CHANCE_RELIABILITY:
        return []
    remedies = ["prune.ema=0.2"] * (ema > 0.2) + ["prune.adjust=true"] * (not adjust) or [
        "prune.policy=random, which needs no score"
    ]
    line = f"the ranking is no better than chance: {', '.join(evidence)}; try {' or '.join(remedies)}"
    return [Finding("ranking", 2 - reliability / CHANCE_RELIABILITY, line)]


def _term_is_drowned(
    known: Mapping[str, float], memory_ratio: float, beta: float, memory: str
) -> list[Finding]:
    if 1 / DROWNED <= memory_ratio <= DROWNED:
        return []
    loud, quiet = ("memory term", "loss") if memory_ratio > 1 else ("loss", "memory term")
    correlation = (
        f", their rank correlation {known['rank_correlation']:+.2f}" if "rank_correlation" in known else ""
    )
    spread = (
        f"its spread is {max(memory_ratio, 1 / max(memory_ratio, 1e-9)):.3g} times the {quiet}'s{correlation}"
    )
    remedies = [f"prune.beta={beta / memory_ratio:.2g}"] * (memory_ratio > 0)
    if memory != "standardized":  # there beta is the ratio
        remedies = ["prune.memory=standardized with prune.beta=1", *remedies]
    line = f"the {loud} drowns the {quiet}: {spread}; try {' or '.join(remedies)}"
    return [Finding("drowned", max(memory_ratio, 1 / max(memory_ratio, 1e-9)) / DROWNED, line)]


def _kept_sets_rotate(
    known: Mapping[str, float], kept_share: float, num_samples: int, remember: str
) -> list[Finding]:
    if "kept_overlap" not in known:
        return []
    overlap, chance = known["kept_overlap"], known["kept_overlap_chance"]
    least = max(0.0, (kept_share + chance - 1) / kept_share)
    margin = max(ROTATION * (chance - least), 3 * _standard_error(chance, kept_share, num_samples))
    if chance - overlap <= margin:
        return []
    line = (
        f"samples are pruned for having been trained (low-frequency learning): kept sets overlap by {overlap:.0%} where chance "
        f"gives {chance:.0%}; try {remember}"
    )
    return [Finding("rotation", (chance - overlap) / margin, line)]


def _samples_are_idle(known: Mapping[str, float], kept_share: float, mix: str) -> list[Finding]:
    limit = max(IDLE_SHARE, 2 * (1 - kept_share) ** IDLE_EPOCHS)
    if known["idle_share"] <= limit:
        return []
    line = f"{known['idle_share']:.0%} of the samples were not trained for {IDLE_EPOCHS} epochs; try {mix}"
    return [Finding("idle", known["idle_share"] / limit, line)]


def _noise_is_kept(
    known: Mapping[str, float], kept_share: float, num_samples: int, remember: str
) -> list[Finding]:
    if "noisy_kept" not in known:
        return []
    kept, data = known["noisy_kept"], known["noisy_data"]
    margin = max(NOISE_EXCESS * data, 3 * _standard_error(data, kept_share, num_samples))
    if kept - data <= margin:
        return []
    line = (
        f"mislabelled samples are over-represented among the kept: {kept:.0%} against {data:.0%} in "
        f"the data; try {remember}"
    )
    return [Finding("noise", (kept - data) / margin, line)]


def _classes_are_uneven(
    known: Mapping[str, float], mix: str, class_names: Sequence[str] | None
) -> list[Finding]:
    if "class_ratio_min" not in known:
        return []
    low, high = known["class_ratio_min"], known["class_ratio_max"]
    severity = max(high, 1 / max(low, 1e-9)) / CLASS_RATIO
    if severity <= 1:
        return []
    few, many = (
        class_names[int(known[which])] if class_names else f"class {known[which]:.0f}"
        for which in ("class_min", "class_max")
    )
    line = f"class imbalance of the kept set: {few} {low:.2g} times its share, {many} {high:.2g} times; "
    return [
        Finding(
            "balance",
            severity,
            f"{line}some is expected of the method and forcing balance can cost accuracy; to even it, {mix}",
        )
    ]


def _standard_error(share: float, kept_share: float, num_samples: int) -> float:
    """Of a share among a random kept set (drawn without replacement) whose true value is `share`."""
    return math.sqrt(share * (1 - share) / (kept_share * num_samples) * (1 - kept_share))
