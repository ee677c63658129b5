"""What a batch goes through, trained on or only scored: views, network, the terms of its score.

Letters: N samples, B batch, K samples of a pass, D features, P projections, F draw features.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ssl_emp.augment import Recipe, cut_views, draw_features, draw_params
from ssl_emp.commands.job import Job
from ssl_emp.loss import nt_xent
from ssl_emp.policies import random_subset
from ssl_emp.pruning import feature_distance, shuffled_batches
from ssl_emp.run.report import Report, rank_correlation
from ssl_emp.scores import ScoreState
from ssl_emp.supervised import cross_entropy, prediction_entropy

# where the epoch numbers of draws that are not trained on begin
RELIABILITY_EPOCHS, SCORING_EPOCHS = 10**6, 10**8


def compiled(job: Job, report: Report) -> tuple[Any, Any]:
    """(model, cut_views), through torch.compile where it is asked for and a compiler is found."""
    if not job.config.compile:
        return job.model, cut_views
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=job.device))
    except Exception as error:  # dynamo wraps a missing C++ compiler or triton in many types
        report.say(f"compile   not available ({type(error).__name__}), going on without it")
        return job.model, cut_views
    if not job.config.cuda_graphs:
        return torch.compile(job.model), torch.compile(cut_views, dynamic=False)
    if job.device.type != "cuda":
        report.say("compile   cuda_graphs needs a GPU, going on without it")
        return torch.compile(job.model), torch.compile(cut_views, dynamic=False)
    replayed = torch.compile(cut_views, dynamic=False, mode="reduce-overhead")

    def views_of(*arguments: Any) -> tuple[Tensor, ...]:
        # every step, trained or scored, begins here: the last one's outputs may be reused
        torch.compiler.cudagraph_mark_step_begin()
        return replayed(*arguments)

    return torch.compile(job.model, mode="reduce-overhead"), views_of


def forward_views(
    job: Job, model: Any, view_a: Tensor, view_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pass, one BatchNorm over both views, as SimCLR: (B, 3, S, S) x 2 -> h_a, h_b (B, D), z_a, z_b (B,
    P).
    """
    views = torch.cat([view_a, view_b]).to(memory_format=torch.channels_last)
    with torch.autocast(job.device.type, dtype=torch.bfloat16, enabled=job.bf16):
        h, z = model(views)
    return (*h.chunk(2), *z.chunk(2))


def simclr_terms(
    job: Job,
    model: Any,
    views_of: Any,
    index: Tensor,
    images: Tensor,
    epoch: int,
    recipe: Recipe,
    common_draw: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The samples `index` (B,) through the network -> loss (B,) nats, distance (B,), and what was drawn (B,
    F) if that is used.

    Of several ranks each gives its own part of the batch.
    """
    config, side = job.config, images.shape[-1]
    params = draw_params(config.seed, epoch, torch.zeros_like(index) if common_draw else index, recipe, side)
    view_a, view_b = views_of(images, params, recipe)
    h_a, h_b, z_a, z_b = forward_views(job, model, view_a, view_b)
    loss = nt_xent(z_a, z_b, config.temperature, job.ranks)
    distance = feature_distance(h_a.detach(), h_b.detach(), config.prune.memory)
    return loss, distance, draw_features(*params, side) if config.prune.adjusts else None


def supervised_terms(
    job: Job,
    model: Any,
    views_of: Any,
    index: Tensor,
    images: Tensor,
    epoch: int,
    recipe: Recipe,
    common_draw: bool = False,
) -> tuple[Tensor, Tensor, None]:
    """The samples `index` (B,) through the network -> loss (B,) nats, minus the prediction's entropy (B,)
    nats.
    """
    config = job.config
    params = draw_params(
        config.seed, epoch, torch.zeros_like(index) if common_draw else index, recipe, images.shape[-1]
    )
    (view,) = views_of(images, params[:1], recipe)
    with torch.autocast(job.device.type, dtype=torch.bfloat16, enabled=job.bf16):
        _, logits = model(view.to(memory_format=torch.channels_last))
    assert job.labels is not None
    return (
        cross_entropy(logits, job.labels[index], config.label_smoothing),
        -prediction_entropy(logits.detach()),
        None,
    )


def terms_of(job: Job) -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    """`simclr_terms` or `supervised_terms`."""
    return simclr_terms if job.config.objective == "simclr" else supervised_terms


def gathered(job: Job, loss: Tensor, memory: Tensor, draw: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What `terms_of` gave on every rank, of the whole batch: terms (2, B), and the draws (B, F). One
    exchange.
    """
    part = torch.stack([loss.detach(), memory], 1)
    whole = job.ranks.gather(part if draw is None else torch.cat([part, draw], 1))
    return whole[:, :2].T, None if draw is None else whole[:, 2:]


@torch.no_grad()
def score_pass(
    job: Job, model: Any, views_of: Any, first: Tensor, rest: Tensor, epoch: int, recipe: Recipe
) -> tuple[Tensor, Tensor | None]:
    """Score `first` (K,) with the weights of now, without training: -> terms (2, K), draws (K, F), in the
    order of `first`.

    Scores must be comparable with those of the training pass: same batch size, same views as that epoch's,
    BatchNorm on the statistics of the batch, and no running statistic touched. The last batch is filled up
    from `rest`, whose scores are dropped.
    """
    config, common_draw = job.config, job.config.prune.scoring_draw == "common"
    batches = -(-len(first) // config.batch_size)
    circle = torch.cat([first, rest])
    table = circle.repeat(2)[: batches * config.batch_size].view(batches, config.batch_size)
    norms = [module for module in job.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    terms, draws = [], []
    for index, images in job.store.stream(job.ranks.part(table)):
        batch_terms, draw = gathered(
            job, *terms_of(job)(job, model, views_of, index, images, epoch, recipe, common_draw)
        )
        terms.append(batch_terms)
        draws += [] if draw is None else [draw]
    for norm in norms:
        norm.track_running_stats = True
    return torch.cat(terms, dim=1)[:, : len(first)], torch.cat(draws)[: len(first)] if draws else None


def score_passes(
    job: Job, model: Any, views_of: Any, first: Tensor, rest: Tensor, epoch: int
) -> tuple[Tensor, Tensor | None]:
    """The mean of `prune.scoring_draws` passes, at `prune.scoring_size` pixels: the first with this epoch's
    views.
    """
    prune = job.config.prune
    recipe = replace(job.recipe, size=prune.scoring_size or job.recipe.size)
    keys = [epoch + draw * SCORING_EPOCHS for draw in range(prune.scoring_draws)]
    passes = [score_pass(job, model, views_of, first, rest, key, recipe) for key in keys]
    draws = [draw for _, draw in passes if draw is not None]
    return torch.stack([terms for terms, _ in passes]).mean(0), torch.stack(draws).mean(0) if draws else None


def split_by_age(job: Job, scored_epoch: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
    """(what this epoch's scoring pass must score, everything else), both in a keyed order.

    `scoring: pruned` scores what the last epoch did not train on, `all` everything.
    """
    trained_before = job.steps[epoch - 1] * job.config.batch_size
    count = job.num_samples if job.config.prune.scoring == "all" else job.num_samples - trained_before
    oldest_first = scored_epoch.argsort(stable=True)  # (N,)
    first, rest = (
        shuffled_batches(part, 1, job.config.seed, epoch).flatten()
        for part in (oldest_first[:count], oldest_first[count:])
    )
    return first, rest


def foresee(job: Job, state: ScoreState, epoch: int) -> Tensor:
    """The terms (2, N) that each sample is expected to have under the views of `epoch`, without drawing them:
    randomness is keyed.
    """
    everyone, side = torch.arange(job.num_samples, device=job.device), job.images.pixels.shape[-1]
    parts = []
    for index in everyone.split(2**16):  # a draw is 150 bytes and more a sample on the way
        parts.append(
            state.expected(
                index, draw_features(*draw_params(job.config.seed, epoch, index, job.recipe, side), side)
            )
        )
    return torch.cat(parts, 1)


def measure_reliability(
    job: Job, model: Any, views_of: Any, state: ScoreState, epoch: int
) -> dict[str, float | None]:
    """How much of the score is the sample and not the draw: by two new draws of the same samples with the
    weights of now.

    `draw_reliability` is the rank correlation of the two draws' scores, r. `score_reliability` is that of the
    score that selects: its correlation c with a draw is the root of (its own reliability times r), so it is
    c² / r; None where r is too close to 0. With `prune.adjust` there is `foresight`, how the score expected
    of a draw correlates with the one it then has; with `prune.shrink` `recall`, the slope of a sample's loss
    on what was remembered of it, both without the draw.
    """
    batch_size = job.config.batch_size
    batches = min(-(-job.config.monitor.reliability_images // batch_size), job.num_samples // batch_size)
    everyone = torch.arange(job.num_samples, device=job.device)
    # the same ones all the time
    sample = random_subset(job.num_samples, batches * batch_size, 0, -1, job.device).index
    scores, foresights = [], []
    for draw in (1, 2):
        epoch_key = draw * RELIABILITY_EPOCHS + epoch  # views that no training epoch sees
        order = shuffled_batches(sample, 1, job.config.seed, epoch_key).flatten()
        terms, draws = score_pass(job, model, views_of, order, order[:0], epoch_key, job.recipe)
        if draws is not None:
            known = state.times_scored[order] > 0
            expected = job.rule.score(state.expected(order, draws), state.variance[order], epoch)
            seen = job.rule.score(terms, torch.zeros_like(terms[0]), epoch)
            foresights.append(rank_correlation(expected[known], seen[known]))
            terms = state.adjusted(order, terms, draws)
        score = everyone.new_zeros(job.num_samples, dtype=torch.float32)
        score[order] = job.rule.score(terms, torch.zeros_like(terms[0]), epoch)
        scores.append(score[sample])
    selecting = job.rule.score(state.terms, state.variance, epoch)[sample]
    scored = selecting < torch.inf
    selecting, *scores = (score[scored] for score in (selecting, *scores))
    both = rank_correlation(*scores)
    with_selecting = (rank_correlation(selecting, scores[0]) + rank_correlation(selecting, scores[1])) / 2
    r, c, *foresight = torch.stack(
        [both, with_selecting, *([torch.stack(foresights).mean()] if foresights else [])]
    ).tolist()
    figures: dict[str, float | None] = {
        "draw_reliability": r,
        "score_reliability": c * abs(c) / r if r > 0.02 else None,
    }
    figures |= {"foresight": foresight[0]} if foresight else {}
    return figures | ({"recall": state.slope()[0].item()} if foresight and state.shrink else {})
