"""`transfer`: encoders on a suite of target data sets -> a table of its own."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linear_eval import EvalError, Features
from linear_eval.knn import knn_predict
from linear_eval.linear import L2_GRID, L2_RANGE, MAX_ITER, linear_probe, multi_label_probe, sgd_probe
from linear_eval.metrics import MULTI_LABEL
from linear_eval.transfer import (
    Cell,
    Outcome,
    Suite,
    Target,
    Transfer,
    draw_bars,
    missing_lines,
    parse_suite,
    run_suite,
    tabulate,
    to_csv,
    to_markdown,
    to_rows,
)
from ssl_emp.commands.eval_images import Splits, images_hash, load_target
from ssl_emp.commands.evaluators import Judged, Session, build, extract, or_warn, weights_hash
from ssl_emp.commands.ledger import MISTAKES
from ssl_emp.commands.rows import Row
from ssl_emp.commands.subjects import Subject
from ssl_emp.config import parse_yaml
from ssl_emp.data.images import ImageSet
from ssl_emp.errors import UserError
from ssl_emp.safe_files import read_text, write_atomically
from ssl_emp.shipped import find_config


def judge_target(
    session: Session, subject: Subject, target: Target, splits: dict[str, ImageSet]
) -> tuple[Outcome, str]:
    """One encoder on one target by the target's protocol, and the hash of its weights."""
    size = splits["train"].pixels.shape[-1]
    config, device = session.config, session.device
    with session.ranks.together():
        encoder = build(subject, size, device)
    judged = Judged(session, subject, encoder, Splits(splits["train"], splits["test"], config.data), None)
    train, test = judged.features
    val = extract(judged, splits["val"], "val") if "val" in splits else None
    if not session.ranks.is_first:
        raise EvalError("process 0 goes on with the features", "see there")
    probe = _knn if target.protocol == "knn" else _linear
    outputs, protocol = probe(session, target, train, val, test)
    protocol = f"{protocol}, {size}px, {subject.weights}"
    return Outcome(outputs, test.y, protocol), weights_hash(encoder)


def _knn(
    session: Session, target: Target, train: Features, val: Features | None, test: Features
) -> tuple[Tensor, str]:
    knn, k = session.config.knn, session.config.knn.num_neighbors[0]
    bank = train if val is None else Features(torch.cat([train.x, val.x]), torch.cat([train.y, val.y]))
    predicted = knn_predict(bank, test, num_neighbors=k, temperature=knn.temperature, device=session.device)
    vote = "majority" if knn.temperature is None else f"T={knn.temperature:g}"
    return predicted, f"cosine kNN, k={k}, {vote}, bank {len(bank.x)}"


def _linear(
    session: Session, target: Target, train: Features, val: Features | None, test: Features
) -> tuple[Tensor, str]:
    """Outputs for the test split and the protocol: a regression for each class where images have several
    labels, heads by SGD, or logistic regression.
    """
    val_fraction = session.config.linear.val_fraction
    given: dict[str, Any] = {"seed": session.config.seed, "val": val, "val_fraction": val_fraction}
    given |= {"device": session.device}
    chosen = f"val ({len(val.x)})" if val is not None else f"{100 * val_fraction:g}% of train"
    grid = f"{len(L2_GRID)} in {L2_RANGE}"
    steps, precision = session.config.linear.max_iter, session.config.linear.precision
    how = "" if steps == MAX_ITER else f"<= {steps} steps, "
    if target.metric in MULTI_LABEL:
        found = multi_label_probe(train, test, target.metric, max_iter=steps, **given)
        points = "11-point AP of VOC2007" if target.metric == "voc_map" else "AP over all points"
        low, high = found.l2.min().item(), found.l2.max().item()
        protocol = f"lbfgs, {how}a binary regression for each of {test.y.shape[1]} classes, "
        protocol += f"l2={low:.3g}..{high:.3g} of {grid} by {points} on {chosen}, refit on train+val, "
        return found.scores, f"{protocol}difficult objects not counted"
    if target.protocol == "linear":
        heads = sgd_probe(train, test, **given)
        return heads.predicted, f"linear heads, SGD, chosen on {chosen}, refit"
    probe = linear_probe(train, test, max_iter=steps, precision=precision, **given)
    how += "" if precision == "float32" else f"{precision}, "
    return probe.predicted, f"lbfgs, {how}l2={probe.l2:.3g} of {grid} chosen on {chosen}, refit on train+val"


def read_suite(given: str) -> Suite:
    """The suite of a YAML file, or of the name of a shipped one. Raises UserError, EvalError."""
    path = find_config(given, suites=True)
    if not path.is_file():  # a pipe or a device would be read for ever
        what = f"transfer.suite={path} is no file"
        raise UserError(what, "give transfer.suite=FILE.yaml, or a shipped one: transfer.suite=small")
    return parse_suite(parse_yaml(read_text(path), str(path)), str(path))


def run_transfer(session: Session, subjects: list[Subject], folder: Path | None) -> None:
    """Every encoder on every target of transfer.suite; each cell is kept in `folder` at once."""
    config, ranks, ledger = session.config, session.ranks, session.ledger
    suite = read_suite(config.transfer.suite)
    by_name = {subject.name: subject for subject in subjects}
    loaded: dict[tuple[str, int | None], dict[str, ImageSet] | Exception] = {}
    judged: dict[tuple[str, str], Row] = {}  # (encoder, data set) -> hashes of its weights and images
    cells: dict[tuple[str, str], Cell] = {}

    def evaluate_pair(name: str, target: Target) -> Outcome:
        subject = by_name[name]
        with ranks.together():
            subject.check()
        key = (target.name, target.image_size or subject.image_size)
        if key not in loaded:
            for other in [other for other in loaded if other[0] != target.name]:
                del loaded[other]  # hold the images of one target at a time
            try:
                with ranks.first_then_others():
                    loaded[key] = load_target(target, subject.image_size, config, session.voice)
            except MISTAKES as error:
                loaded[key] = error
        splits = loaded[key]
        if not isinstance(splits, dict):
            raise splits
        session.voice.note(f"{target.name}: {name}")
        outcome, weights = judge_target(session, subject, target, splits)
        judged[name, target.name] = {"weights": weights, "images": images_hash(splits.values())}
        return outcome

    def rows_of(transfer: Transfer) -> list[Row]:
        about: Row = {"seed": config.seed, "draws": config.transfer.num_draws}
        return [row | about | judged.get((row["encoder"], row["data"]), {}) for row in to_rows(transfer)]

    def keep(cell: Cell) -> None:
        cells[cell.encoder, cell.target.name] = cell
        if ranks.is_first and cell.measured is not None:  # its place among all is known at the end
            ledger.keep(folder, [rows_of(tabulate(suite.name, [cell]))[0] | {"rank": None}], in_table=False)

    given: dict[str, Any] = {"num_resamples": config.transfer.num_draws, "seed": config.seed, "done": keep}
    try:
        run_suite(suite, list(by_name), evaluate_pair, missing=MISTAKES, **given)
    finally:  # also of a suite that was stopped
        pairs = [(name, target) for name in by_name for target in suite.targets]
        left = "stopped before it was judged"
        transfer = tabulate(
            suite.name, [cells.get((name, t.name), Cell(name, t, "", None, left)) for name, t in pairs]
        )
        if ranks.is_first and cells:
            # no mean over a part of the suite
            num_rows = None if len(cells) == len(pairs) else len(transfer.cells)
            show(session, transfer, rows_of(transfer)[:num_rows], folder)
    if ranks.is_first and folder is not None and any(cell.measured is not None for cell in transfer.cells):
        with or_warn(session.voice, folder / "transfer.png"):
            draw_bars(transfer, folder / "transfer.png")


def show(session: Session, transfer: Transfer, rows: list[Row], folder: Path | None) -> None:
    """Keep the rows, and print the table of the suite after that of the other evaluators."""
    ledger = session.ledger
    with ledger.interrupts.held():
        ledger.keep(folder, rows, in_table=False)
        if folder is not None:
            with or_warn(session.voice, folder / "transfer.csv"):
                write_atomically(folder / "transfer.csv", to_csv(transfer).encode(), shared=True)
        ledger.show()
        ledger.print(to_markdown(transfer) + "".join(f"{line}\n" for line in missing_lines(transfer)))
