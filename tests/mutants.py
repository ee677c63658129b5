"""Does the suite notice? Each mutant is one wrong line of the kind that costs a run in silence; a copy of the
tree gets it, and the named tests must fail there, after they passed without it.

    python tests/mutants.py            # all of them, some minutes; exit code 1 where one survives
    python tests/mutants.py 3 7        # these
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutant:
    """What goes wrong, where, and which tests should tell."""

    what: str
    file: str
    right: str
    wrong: str
    tests: str
    marker: str = "not gpu"


MUTANTS = [
    Mutant(
        "an interrupted fine-tuning goes on with other images",
        "linear_eval/finetune.py",
        '"train images": content_hash(train_pixels),',
        '"train images": "",',
        "tests/test_finetune.py -k belongs_to_one",
    ),
    Mutant(
        "features of the cache are those of other images",
        "ssl_emp/commands/evaluators.py",
        "{state_hash(encoder)} {images.content['pixels']} {how}",
        "{state_hash(encoder)} {how}",
        "tests/test_cache_keys.py -k features",
    ),
    Mutant(
        "negatives of the own rank only",
        "ssl_emp/loss.py",
        "columns = (ranks.gather(z) / temperature)",
        "columns = (torch.cat([z.detach()] * ranks.world_size) / temperature)",
        "tests/test_ranks.py -k step_of_several",
    ),
    Mutant(
        "the positive of DCL is sought among the first rank's views",
        "ssl_emp/loss.py",
        "other = own + (view",
        "other = (view",
        "tests/test_ranks.py -k losses_of_several",
    ),
    Mutant(
        "DCL leaves out another sample's view",
        "ssl_emp/loss.py",
        "(view + len(z) // 2) % len(z)",
        "(view + len(z) // 2 + 1) % len(z)",
        "tests/test_loss.py -k algorithm_1",
    ),
    Mutant(
        "scores are made of the loss that is trained on, whatever is asked",
        "ssl_emp/commands/pretrain.py",
        "seen = pruner.gather(index, scored, memory, draw)",
        "seen = pruner.gather(index, loss, memory, draw)",
        "tests/test_objective.py -k keeps_what",
    ),
    Mutant(
        "a run under way takes today's rule for auto",
        "ssl_emp/commands/resume.py",
        "    config = keeping_auto(config, before)",
        "    config = config",
        "tests/test_objective.py -k under_way",
    ),
    Mutant(
        "a view's own column is sought at the wrong rank",
        "ssl_emp/loss.py",
        "own = ranks.rank * len(z)",
        "own = 0 * len(z)",
        "tests/test_ranks.py -k step_of_several",
    ),
    Mutant(
        "gradients are not summed over the ranks",
        "ssl_emp/run/ranks.py",
        "        if self.world_size == 1:\n            return model\n",
        "        return model\n",
        "tests/test_ranks.py -k step_of_several",
    ),
    Mutant(
        "BatchNorm of the own part of the batch",
        "ssl_emp/run/ranks.py",
        "mean = centres.mean(0)",
        "mean = centre",
        "tests/test_ranks.py -k step_of_several",
    ),
    Mutant(
        "ranks do not compare their kept lists",
        "ssl_emp/run/ranks.py",
        "        if differing:\n            raise RunFailed(",
        "        if False:\n            raise RunFailed(",
        "tests/test_ranks.py -k disagree",
    ),
    Mutant(
        "scores of the own part of the batch are written to all of it",
        "ssl_emp/prune/pruner.py",
        "whole = gather(torch.cat(parts, 1))",
        "whole = torch.cat(parts, 1).repeat(len(gather(loss)) // len(loss), 1)",
        "tests/faults/test_processes_matrix.py -k D8",
        "faults",
    ),
    Mutant(
        "every epoch draws the same views",
        "ssl_emp/commands/job.py",
        "draw_params(config.seed, epoch, index",
        "draw_params(config.seed, 0, index",
        "tests/test_pretrain.py -k views_that_are_foreseen",
    ),
    Mutant(
        "a resumed run draws its batches anew in the midst of an epoch",
        "ssl_emp/prune/pruner.py",
        'state["chosen"].items()',
        "{}.items()",
        "tests/test_pretrain.py -k resume_equals",
    ),
    Mutant(
        "the learning-rate schedule begins again after a resume",
        "ssl_emp/commands/pretrain.py",
        "job.schedule.set(run.optimizer, run.step)",
        "job.schedule.set(run.optimizer, run.step - run._saved_step)",
        "tests/test_pretrain.py -k resume_equals",
    ),
    Mutant(
        "scores are lost on resume",
        "ssl_emp/prune/pruner.py",
        'self.record.load_state_dict(state["record"])',
        "pass",
        "tests/test_pretrain.py -k resume_equals",
    ),
    Mutant(
        "momentum is lost on resume",
        "ssl_emp/run/run.py",
        '"state": state["optimizer"]["state"]',
        '"state": {}',
        "tests/test_pretrain.py -k resume_equals",
    ),
    Mutant(
        "a bad step moves BatchNorm",
        "ssl_emp/run/guard.py",
        "[torch.where(finite, *pair) for pair in pairs]",
        "[pair[0] for pair in pairs]",
        "tests/faults/test_numerics_matrix.py -k changes_nothing",
    ),
    Mutant(
        "a bad step is scored and counted",
        "ssl_emp/commands/pretrain.py",
        "pruner.observe(seen, where=finite)",
        "pruner.observe(seen)",
        "tests/faults/test_numerics_matrix.py -k changes_nothing",
    ),
    Mutant(
        "a bad step reaches the weights",
        "ssl_emp/optim.py",
        "    optimizer.found_inf = (~where).float()",
        "    optimizer.found_inf = None",
        "tests/faults/test_numerics_matrix.py -k gradient_that_is_not_finite",
    ),
    Mutant(
        "what fills up the last batch of a scoring pass is scored",
        "ssl_emp/prune/pruner.py",
        "torch.cat([first, rest]).repeat(2)",
        "torch.cat([rest, first]).repeat(2)",
        "tests/test_pretrain.py -k fills_up",
    ),
    Mutant(
        "a policy's weights do not reach the loss",
        "ssl_emp/prune/pruner.py",
        "chosen.weight[index].repeat",
        "torch.ones_like(chosen.weight[index]).repeat",
        "tests/test_pretrain.py -k weights_of_a_policy",
    ),
    Mutant(
        "the same samples are cut off in every epoch",
        "ssl_emp/prune/plan.py",
        "circle.roll(-(epoch * remainder))",
        "circle.roll(0)",
        "tests/test_plan.py -k goes_round",
    ),
    Mutant(
        "a checkpoint's hash is not looked at",
        "ssl_emp/run/checkpoint.py",
        "_sha256(path) not in",
        "False and _sha256(path) not in",
        "tests/test_checkpoint.py -k damaged_checkpoint",
    ),
    Mutant(
        "a checkpoint may hold code",
        "ssl_emp/run/checkpoint.py",
        'map_location="cpu", weights_only=True',
        'map_location="cpu", weights_only=False',
        "tests/test_checkpoint.py -k pickle",
    ),
    Mutant(
        "a checkpoint has its name before it is on disk",
        "linear_eval/files.py",
        "os.fsync(file.fileno())",
        "pass",
        "tests/test_checkpoint.py -k put_on_disk",
    ),
]


def passes(tree: Path, mutant: Mutant) -> bool:
    """Whether the mutant's tests pass in `tree`."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        mutant.marker,
        *mutant.tests.split(),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), (
        f"{mutant.what}: the tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    )
    return done.returncode == 0


def main() -> int:
    wanted = [int(number) for number in sys.argv[1:]] or range(1, len(MUTANTS) + 1)
    killed, began, sound = 0, time.monotonic(), set[str]()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(
            ROOT,
            tree,
            ignore=shutil.ignore_patterns(".git", ".venv", "runs", ".*_cache", "__pycache__", "results"),
        )
        for number in wanted:
            mutant = MUTANTS[number - 1]
            path = tree / mutant.file
            right = path.read_text()
            assert right.count(mutant.right) == 1, (
                f"{mutant.file} has {right.count(mutant.right)} times: {mutant.right}"
            )
            if mutant.tests not in sound:
                assert passes(tree, mutant), f"{mutant.tests} fails without the mutant"
                sound.add(mutant.tests)
            path.write_text(right.replace(mutant.right, mutant.wrong))
            survived = passes(tree, mutant)
            path.write_text(right)
            killed += not survived
            print(
                f"{number:2d} {'SURVIVED' if survived else 'killed  '} {mutant.what} ({mutant.tests})",
                flush=True,
            )
    print(f"{killed} of {len(wanted)} mutants killed in {time.monotonic() - began:.0f} s")
    return int(killed < len(wanted))


if __name__ == "__main__":
    sys.exit(main())
