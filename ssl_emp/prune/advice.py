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
REPEAT_EPOCHS = 10
CLEARLY_WORSE = 1.5  # times the severity that was told last


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


def next_finding(
    found: Sequence[Finding], told: Mapping[str, tuple[int, float]], epoch: int
) -> Finding | None:
    """The one finding to tell in `epoch`, or None. The caller then notes `told[kind] = (epoch, severity)`.

    A kind that was never told goes first; one that was is told again after REPEAT_EPOCHS epochs, or at once
    where it became CLEARLY_WORSE.
    """

    def due(finding: Finding) -> bool:
        last, severity = told.get(finding.kind, (-math.inf, 0.0))
        return epoch - last >= REPEAT_EPOCHS or finding.severity >= CLEARLY_WORSE * severity

    return min(filter(due, found), key=lambda finding: finding.kind in told, default=None)


def _ranking_is_chance(known: Mapping[str, float], policy: Ranking, can_adjust: bool) -> list[Finding]:
    evidence = []
    if "score_repeat" in known:
        samples = f"{known['score_repeat_samples']:,.0f} samples"
        evidence += [f"scores of consecutive epochs correlate by {known['score_repeat']:.2f} ({samples})"]
    if "kept_overlap" in known:
        overlap, chance = known["kept_overlap"], known["kept_overlap_chance"]
        evidence += [f"kept sets overlap by {overlap:.0%} where chance gives {chance:.0%}"]
    judges = {
        "score_reliability": "the score's reliability is",
        "draw_reliability": "two draws of the score correlate by",
    }
    if policy.foresees:
        judges = {"foresight": "what is expected of a draw correlates with what it is by"} | judges
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
    line = f"the ranking is no better than chance: {', '.join(evidence)}; try {' or '.join(remedies)}"
    return [Finding("ranking", 2 - reliability / CHANCE_RELIABILITY, line)]


def _term_is_drowned(known: Mapping[str, float], memory_ratio: float, emp: Emp | None) -> list[Finding]:
    if emp is None or 1 / DROWNED <= memory_ratio <= DROWNED:
        return []
    loud, quiet = ("memory term", "loss") if memory_ratio > 1 else ("loss", "memory term")
    correlation = (
        f", their rank correlation {known['rank_correlation']:+.2f}" if "rank_correlation" in known else ""
    )
    spread = (
        f"its spread is {max(memory_ratio, 1 / max(memory_ratio, 1e-9)):.3g} times the {quiet}'s{correlation}"
    )
    remedies = [f"prune.beta={emp.beta / memory_ratio:.2g}"] * (memory_ratio > 0)
    if emp.memory != "standardized":  # there beta is the ratio
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
        "samples are pruned for having been trained (low-frequency learning): "
        f"kept sets overlap by {overlap:.0%} where chance gives {chance:.0%}; try {remember}"
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
