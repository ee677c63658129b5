"""A pruned epoch in words: the failure signatures of EMP's paper (arXiv 2408.16031), each with the key to
turn.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ssl_emp.prune.figures import IDLE_EPOCHS
from ssl_emp.prune.policies import Emp, Indices, Policy, Ranking

# below this many samples a share or a correlation is off by more than 0.05 (1 / sqrt(n)) by chance alone
MIN_SAMPLES = 400
# the kept samples' mean true score lies above the average by sqrt(reliability) of what an exact ranking
# reaches: here, a third
CHANCE_RELIABILITY = 0.1
# two uncorrelated terms with this ratio of spreads: the smaller one makes 4 % of the score's variance
DROWNED = 5.0
ROTATION = 0.2  # of the way from the overlap that chance gives to the least one possible
IDLE_SHARE = 0.1  # and twice what a random choice of this size leaves out; a ranking is meant to leave some
NOISE_EXCESS = 0.15  # of the share in the data, and three standard errors
CLASS_RATIO = (
    2.0  # a class kept at twice its share, or at half of it; the paper calls some imbalance expected
)


@dataclass(frozen=True)
class Finding:
    """One thing that is off: its kind, how bad it is (1 = at the threshold, more is worse), a line for a
    person.
    """

    kind: str
    severity: float
    line: str


def findings(
    figures: Mapping[str, float | None],
    policy: Policy,
    num_samples: int,
    *,
    can_adjust: bool = True,
    class_names: Sequence[str] | None = None,
) -> list[Finding]:
    """What is off in a pruned epoch; nothing for sets below MIN_SAMPLES. Not for full epochs.

    Args:
        figures: of `Pruner.figures`, and where known `score_reliability` of the score that ranks,
            `draw_reliability` of one observation (0 .. 1), and `foresight`, the rank correlation of what was
            expected of the coming draws with what they were: what judges a policy that foresees, since there
            the sample's own part may be noise.
        can_adjust: whether there are covariates that could be taken out of the score.
        class_names: for the line; None: numbers.
    """
    known = {name: value for name, value in figures.items() if value is not None}
    if num_samples < MIN_SAMPLES:
        return []
    kept_share = known["kept_share"]
    emp = policy if isinstance(policy, Emp) else None
    memory_ratio = 1.0  # spread of the memory term over the loss's
    if emp and emp.beta > 0 and emp.loss_weight != 0 and known.get("std_loss"):
        memory_ratio = known["std_beta_memory"] / (abs(emp.loss_weight) * known["std_loss"])
    mix = "another prune.indices" if isinstance(policy, Indices) else "a smaller prune.fraction"
    if isinstance(policy, Ranking):
        mix = f"prune.explore={min(2 * policy.explore, 1) or 0.1:.2g}"
    remember = "prune.policy=emp"
    if emp:  # more of a term that decides already would change nothing
        remember = mix if memory_ratio > DROWNED else f"prune.beta={2 * emp.beta or 1:.2g}"

    found: list[Finding] = []
    if isinstance(policy, Ranking):
        found += _ranking_is_chance(known, policy, can_adjust)
        found += _term_is_drowned(known, memory_ratio, emp)
        found += _kept_sets_rotate(known, kept_share, num_samples, remember)
    if not policy.keeps_one_subset:  # a subset that stays was asked to leave the rest untrained
        found += _samples_are_idle(known, kept_share, mix)
    if policy.uses_scores:
        found += _noise_is_kept(known, kept_share, num_samples, remember)
    return found + _classes_are_uneven(known, mix, class_names)


def next_finding(found: Sequence[Finding], told: Mapping[str, tuple[int, float]]) -> Finding | None:
    """The one finding to tell now, or None. The caller then notes `told[kind]`: each kind is told once a run,
    and the figures of every epoch go on saying how things stand.
    """
    return next((finding for finding in found if finding.kind not in told), None)


def _ranking_is_chance(known: Mapping[str, float], policy: Ranking, can_adjust: bool) -> list[Finding]:
    evidence = []
    if "score_repeat" in known:
        samples = f"{known['score_repeat_samples']:,.0f} images"
        evidence += [f"scores of one epoch and the next correlate by {known['score_repeat']:.2f}, {samples}"]
    if "kept_overlap" in known:
        overlap, chance = known["kept_overlap"], known["kept_overlap_chance"]
        evidence += [f"{overlap:.0%} of the kept were kept in the epoch before, {chance:.0%} by chance"]
    judges = {
        "score_reliability": "the reliability of the score, from 0 to 1, is",
        "draw_reliability": "scores of an image in other random views correlate by",
    }
    if policy.foresees:
        judges = {"foresight": "expected and real losses of the coming views correlate by"} | judges
    for name, words in judges.items():
        if name in known:
            reliability, evidence = known[name], [f"{words} {known[name]:.2f}", *evidence]
            break
    else:
        # where a running mean ranks, this proves nothing: means resemble themselves, and single observations
        # do not rank
        if policy.ema < 1 or known.get("score_repeat_samples", 0) < MIN_SAMPLES:
            return []
        reliability = known["score_repeat"]
        # not by chance: training turns the order about, see _kept_sets_rotate
        if reliability <= -CHANCE_RELIABILITY:
            return []
    if reliability >= CHANCE_RELIABILITY:
        return []
    remedies = ["prune.ema=0.2"] if policy.ema > 0.2 else []
    remedies += ["prune.adjust=true"] if can_adjust and not policy.adjusts else []
    remedies = remedies or ["prune.policy=random, which needs no score"]
    line = (
        "images are chosen by a score that is little more than noise, so hardly better than by chance "
        f"({'; '.join(evidence)}); try {' or '.join(remedies)}"
    )
    return [Finding("ranking", 2 - reliability / CHANCE_RELIABILITY, line)]


def _term_is_drowned(known: Mapping[str, float], memory_ratio: float, emp: Emp | None) -> list[Finding]:
    if emp is None or 1 / DROWNED <= memory_ratio <= DROWNED:
        return []
    loud, quiet = ("memory term", "loss") if memory_ratio > 1 else ("loss", "memory term")
    times = max(memory_ratio, 1 / max(memory_ratio, 1e-9))
    remedies = [f"prune.beta={emp.beta / memory_ratio:.2g}"] * (memory_ratio > 0)
    if emp.memory != "standardized":  # there beta is the ratio
        remedies = ["prune.memory=standardized with prune.beta=1", *remedies]
    line = (
        f"of the two parts of the score only the {loud} decides which images are kept: it varies {times:.3g} "
        f"times as much as the {quiet}; for both to count, try {' or '.join(remedies)}"
    )
    return [Finding("drowned", times / DROWNED, line)]


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
        "images take turns: one that was trained on is left out of the next epoch for it "
        f"({overlap:.0%} of the kept were kept in the epoch before, {chance:.0%} by chance); try {remember}"
    )
    return [Finding("rotation", (chance - overlap) / margin, line)]


def _samples_are_idle(known: Mapping[str, float], kept_share: float, mix: str) -> list[Finding]:
    limit = max(IDLE_SHARE, 2 * (1 - kept_share) ** IDLE_EPOCHS)
    if known["idle_share"] <= limit:
        return []
    line = f"{known['idle_share']:.0%} of the images were in none of the last {IDLE_EPOCHS} epochs; try {mix}"
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
        f"images with a wrong label are kept too often: they are {kept:.0%} of the kept and {data:.0%} of "
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
    line = (
        f"the classes are kept unevenly: {few} at {low:.2g} times its share of the data, {many} at "
        f"{high:.2g} times; some of that is the method, and evening it can cost accuracy; to even it, "
        f"try {mix}"
    )
    return [Finding("balance", severity, line)]


def _standard_error(share: float, kept_share: float, num_samples: int) -> float:
    """Of a share among a random kept set (drawn without replacement) whose true value is `share`."""
    return math.sqrt(share * (1 - share) / (kept_share * num_samples) * (1 - kept_share))
