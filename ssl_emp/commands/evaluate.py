"""Judge encoders: encoder -> features -> knn | linear | fewshot | finetune | diagnose | transfer -> one
table, and the rows as JSON. What may be typed is in ssl_emp/commands/arguments.py.
"""

import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from linear_eval import EvalError
from linear_eval.errors import first_line
from linear_eval.finetune import state_hash
from ssl_emp.commands.arguments import evaluate_parser, evaluate_usage
from ssl_emp.commands.card import try_to_renew
from ssl_emp.commands.eval_config import EvalConfig, check, parse_overrides
from ssl_emp.commands.eval_images import NONE_GIVEN, GivenImages, Splits, images_hash, load_splits
from ssl_emp.commands.evaluators import (
    EVALUATORS,
    Judged,
    Result,
    Session,
    build,
    out_of_memory,
    weights_hash,
)
from ssl_emp.commands.ledger import MISTAKES, Ledger, Voice
from ssl_emp.commands.predict import predict
from ssl_emp.commands.report import write_report
from ssl_emp.commands.rows import COLUMNS, Row
from ssl_emp.commands.rows import write_rows as write_rows  # for scripts that add rows of their own
from ssl_emp.commands.subjects import Subject, find_subjects, is_run
from ssl_emp.commands.transfer import run_transfer
from ssl_emp.config import DataConfig
from ssl_emp.device import keep_freed_memory, pick_device
from ssl_emp.errors import RunFailed, UserError, path_word
from ssl_emp.loggers.feed import tell_evaluation
from ssl_emp.run.interrupts import Interrupts, Stopped
from ssl_emp.run.ranks import (
    ALONE,
    LostRank,
    NoPlace,
    Ranks,
    connect,
    end_abruptly,
    end_with_line,
    leave_ranks,
)
from ssl_emp.run.report import add_evaluation_events
from ssl_emp.run.streams import prepare_streams
from ssl_emp.run.threads import Threads
from ssl_emp.safe_files import check_inner
from ssl_emp.text import command_line

AGAIN = ". fix: see what it wrote, and start all of them again"
ALL_EVALUATORS = (*EVALUATORS, "transfer")


def main(argv: list[str] | None = None) -> int:
    prepare_streams()
    keep_freed_memory()
    # checkpoints from model hubs are read without pickle
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    words = sys.argv[1:] if argv is None else argv
    ranks = ALONE
    try:
        with Interrupts() as interrupts:
            if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
                ranks = connect(EvalConfig().timeout_seconds, advice=AGAIN)
            if words[:1] == ["predict"]:  # write ./predict for a folder of that name
                code = predict(words[1:])
            else:
                code = evaluate(argv, interrupts, ranks)
            leave_ranks(ranks)
        return code
    except NoPlace as error:
        return end_with_line(str(error), 2, ranks, True)
    except (UserError, EvalError) as error:
        return end_with_line(str(error), 2, ranks)
    except RunFailed as error:  # of another process, in what all do together
        return end_with_line(str(error), 1, ranks, ranks.is_first)
    except LostRank as error:
        return end_with_line(str(error), error.code, ranks, error.speaks, error.lost)
    except Stopped as stopped:
        end_abruptly(ranks, 128 + stopped.number)
        return 128 + stopped.number
    except KeyboardInterrupt:
        end_abruptly(ranks, 130)
        return 130
    except Exception as error:
        ranks.report_failure(f"{type(error).__name__}: {error}", 1)
        raise  # a bug: the traceback is what helps


def evaluate(argv: list[str] | None, interrupts: Interrupts, ranks: Ranks = ALONE) -> int:
    """Everything that the command line asks for; the exit code."""
    # mistakes on the command line are raised together too: torchrun ends all processes once one has ended
    with ranks.first_then_others():
        subjects, evaluators, config, device, out = find_work(argv, ranks)
    ranks.set_timeout(config.timeout_seconds)
    ledger = Ledger(interrupts, Voice(ranks.is_first))
    if device.type == "cpu" and (line := Threads("auto", moves=False, key="OMP_NUM_THREADS=N").line):
        ledger.voice.note(f"threads: {line}")
    return judge_all(Session(config, device, ranks, ledger), subjects, evaluators, out)


def judge_all(
    session: Session,
    subjects: list[Subject],
    evaluators: list[str],
    out: Path | None,
    given: GivenImages = NONE_GIVEN,
) -> int:
    """Every encoder by every evaluator: what the command and `ssl_emp.evaluate` both do. The exit code.

    Args:
        out: where rows go; None: to the folder of each subject.
        given: images from Python, in the place of data.source and data.test_source.
    """
    ranks, ledger = session.ranks, session.ledger
    alone = [evaluator for evaluator in evaluators if evaluator != "transfer"]
    loaded: dict[tuple[DataConfig, int | None], Splits | Exception] = {}

    def splits_of(subject: Subject) -> Splits:
        key = (subject.data, subject.image_size)
        if key not in loaded:
            try:
                with ranks.first_then_others():
                    splits = load_splits(*key, session.voice, given)
                try:
                    with ranks.together():  # all have a test split, or none
                        if splits.no_test is not None:
                            raise splits.no_test
                except MISTAKES as error:
                    splits = replace(splits, test=None, no_test=error)
                loaded[key] = splits
            except MISTAKES as error:
                loaded[key] = error
        found = loaded[key]
        if isinstance(found, Exception):
            raise found
        return found

    try:
        try:
            for subject in subjects if alone else []:
                judge(session, subject, partial(splits_of, subject), alone, out or subject.eval_dir)
        finally:
            ledger.show()
        if "transfer" in evaluators:
            folder = out or next(
                (subject.eval_dir for subject in subjects if subject.eval_dir is not None), None
            )
            if folder is not None and is_run(folder.parent):
                check_inner(folder.parent, folder.name)
            run_transfer(session, subjects, folder)
    finally:
        renew_cards(session, subjects)
        if out is None:  # elsewhere, no row is in a run
            renew_reports(session, subjects)
        code = ledger.close()
    for kept in ledger.kept_in if ranks.is_first else []:
        if kept.name == "eval" and is_run(kept.parent):
            tell_loggers(kept.parent, session.voice)
    return code


def tell_loggers(folder: Path, voice: Voice) -> None:
    """What was found of a run reaches the loggers that it was trained with; where it does not, a warning."""
    try:
        add_evaluation_events(folder)
    except OSError as error:
        voice.note(f"warning: no TensorBoard events of the evaluation: {error.strerror}")
    tell_evaluation(folder, lambda text: voice.note(f"warning: {text}"))


def parse_arguments(argv: list[str] | None) -> tuple[list[str], list[str], dict[str, Any], Path | None]:
    """(encoders, evaluators, overrides as nested dicts, --out), each name once and in the order given."""
    arguments = evaluate_parser().parse_intermixed_args(argv)
    words = list(dict.fromkeys(arguments.words))
    evaluators = [word for word in words if word in ALL_EVALUATORS]
    overrides = [word for word in words if "=" in word and not os.path.exists(word)]
    encoders = [path_word(word) for word in words if word not in evaluators and word not in overrides]
    if "embed" in words and not os.path.exists("embed"):
        fix = f"{command_line('embed')} ENCODER IMAGES --out FILE.parquet"
        raise UserError("embed is no evaluator, but a command of its own", fix)
    for wanted, kind in ((encoders, "encoder"), (evaluators, "evaluator")):
        if not wanted:
            raise UserError(f"no {kind} named", evaluate_usage())
    out = None if arguments.out is None else Path(arguments.out)
    return encoders, evaluators, parse_overrides(overrides), out


def renew_cards(session: Session, subjects: list[Subject]) -> None:
    """The model card of every run that was judged, with what is known of its encoder by now."""
    ledger = session.ledger
    for subject in subjects if session.ranks.is_first else []:
        found = [row for row in ledger.found.values() if row["encoder"] == subject.name]
        weights = [row.get("weights") for row in found if row["value"] is not None]
        if weights and is_run(Path(subject.name)):
            try_to_renew(Path(subject.name), weights[-1], session.voice.note)


def renew_reports(session: Session, subjects: list[Subject]) -> None:
    """RUN/report.html of every run that was judged. Without one, the rows are there all the same."""
    judged = {row["encoder"] for row in session.ledger.found.values() if row["value"] is not None}
    for subject in subjects if session.ranks.is_first else []:
        if subject.name in judged and is_run(Path(subject.name)):
            try:
                path = write_report([Path(subject.name)])
                if not session.ledger.problems:  # else the one line that is shown says what went wrong
                    session.voice.note(f"report: {path}")
            except Exception as error:
                what = f"no report of {subject.name} was written ({first_line(error)})"
                session.voice.note(f"warning: {what}")


def find_work(
    argv: list[str] | None, ranks: Ranks
) -> tuple[list[Subject], list[str], EvalConfig, torch.device, Path | None]:
    """The command line as (encoders, evaluators, settings, device, --out)."""
    names, evaluators, given, out = parse_arguments(argv)
    config = check(EvalConfig, given, "the command line")
    device = own_device(pick_device(config.device), ranks)
    names = [os.path.normpath(name) if os.path.exists(name) else name for name in names]
    return find_subjects(names, config, given, ALL_EVALUATORS), evaluators, config, device, out


def own_device(device: torch.device, ranks: Ranks) -> torch.device:
    """The GPU of this process, one each."""
    if device.type != "cuda" or ranks.world_size == 1:
        return device
    count = torch.cuda.device_count()
    if device.index is not None or ranks.local_rank >= count:
        fix = "start one process a GPU, or set device=cpu"
        raise UserError(f"{ranks.world_size} processes share device={device} ({count} here)", fix)
    return torch.device("cuda", ranks.local_rank)


def judge(
    session: Session,
    subject: Subject,
    splits: Callable[[], Splits],
    evaluators: list[str],
    folder: Path | None,
) -> None:
    """Rows of one encoder, evaluator by evaluator, each kept in `folder` at once; features computed once.

    What one evaluator refuses, or all of them, is a row without a value; the others go on.
    """
    ranks, ledger = session.ranks, session.ledger
    out = None if folder is None else folder / own_folder(subject)
    row: Row = dict.fromkeys(COLUMNS) | {"encoder": subject.name, "data": subject.data.source}
    row |= {"metric": "", "seed": session.config.seed}
    with failure_as_rows(session, [row | {"evaluator": evaluator} for evaluator in evaluators], shared=True):
        with ranks.together():
            subject.check()
        check_places(folder, subject)
        found = splits()
        with ranks.together():
            encoder = build(subject, found.train.pixels.shape[-1], session.device)
        judged = Judged(session, subject, encoder, found, out)
        before = state_hash(encoder)
        _ = judged.rows
        if not ranks.is_first:
            return
        row |= {"data": found.described, "n_test": None if found.test is None else len(found.test.names)}
        row |= {"weights": weights_hash(encoder), "images": images_hash((found.train, found.test))}
        for evaluator in evaluators:
            row |= {"evaluator": evaluator}
            with failure_as_rows(session, [row]):
                results = EVALUATORS[evaluator](judged)
                if state_hash(judged.encoder) != before:
                    what = f"{subject.name} changed while {evaluator} judged it"
                    raise UserError(what, "use an encoder that writes no state in its forward pass")
                ledger.keep(folder, [row | columns(result, subject) for result in results])
                for result in results:
                    if result.then is not None:
                        result.then()


def own_folder(subject: Subject) -> str:
    """The folder of a subject's pictures below that of its rows: a run has these for itself."""
    return "" if subject.eval_dir and is_run(Path(subject.name)) else safe_name(subject.name)


def check_places(folder: Path | None, subject: Subject) -> None:
    """Raise UserError where a folder that is written to is a link in a run directory and leads elsewhere."""
    if folder is None:
        return
    root, names = (folder.parent, [folder.name]) if folder == subject.eval_dir else (folder, [])
    names += [own_folder(subject)] if own_folder(subject) else []
    check_inner(root, *names)
    for inner in ("diagnose", "classifier-finetune", "classifier-linear"):
        check_inner(root, *names, inner)


def columns(result: Result, subject: Subject) -> Row:
    """What a result says in its row. Raises EvalError where its value is not finite: JSON has no such."""
    if not math.isfinite(result.value):
        fix = "use another checkpoint: this encoder has diverged"
        raise EvalError(f"{result.metric} is {result.value}", fix)
    digits = 2 if result.metric.endswith("%") else 4
    std = None if result.std is None else round(result.std, 2)
    about = {"protocol": f"{result.protocol}, {subject.weights}", "metric": result.metric}
    value = result.value if isinstance(result.value, int) else round(result.value, digits)
    return about | {"value": value, "std": std} | ({} if result.n_test is None else {"n_test": result.n_test})


@contextmanager
def failure_as_rows(session: Session, rows: list[Row], *, shared: bool = False) -> Iterator[None]:
    """What goes wrong in here costs these rows, and nothing else.

    Args:
        shared: the processes work together in here. An error that only one of them has must end it.
    """
    config, device, ranks, ledger = session.config, session.device, session.ranks, session.ledger
    try:
        yield
        return
    except LostRank:
        raise
    except MISTAKES as caught:
        error: Exception = caught
    except (torch.OutOfMemoryError, MemoryError) as caught:
        error = out_of_memory(config, device)
        error.__cause__ = caught
    except Exception as caught:
        if shared and ranks.world_size > 1:
            raise
        # the message of torch on a CPU
        error = out_of_memory(config, device) if "can't allocate memory" in str(caught) else caught
    if ranks.is_first:
        for row in rows:
            (ledger.refuse if isinstance(error, MISTAKES) else ledger.crash)(row, error)
    else:
        ledger.code = ledger.code or 2


def safe_name(name: str) -> str:
    """An encoder's name as a folder name."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "encoder"
