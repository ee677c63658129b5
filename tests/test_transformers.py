"""`PrunedTrainer` in Hugging Face's loop: the Trainer's own results where nothing is pruned, exact resume,
refusals.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ssl_emp.plugins.transformers import STATE_NAME, PrunedTrainer, PrunedTrainerMixin
from ssl_emp.prune import Pruner, entropy

SAMPLES, BATCH, EPOCHS, TOKENS, WORDS = 70, 8, 3, 6, 40  # 8 full batches and a remainder
TINY: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": 16,
}  # fmt: skip
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def make_data(label: str = "class") -> list[dict[str, Any]]:
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(WORDS, (SAMPLES, TOKENS), generator=made)
    labels = {
        "class": torch.randint(3, (SAMPLES,), generator=made),
        "value": torch.randn(SAMPLES, generator=made),
        "several": torch.randint(2, (SAMPLES, 3), generator=made).float(),
        "token": torch.where(ids % 4 == 0, -100, ids % 3),
    }[label]
    return [{"input_ids": x.tolist(), "labels": y.tolist()} for x, y in zip(ids, labels, strict=True)]


def make_model(kind: Any = BertForSequenceClassification, labels: int = 3, **config: Any) -> Any:
    set_seed(0)
    return kind(BertConfig(**(TINY | {"num_labels": labels} | config)))


def make_pruner(**options: Any) -> Pruner:
    chosen: dict[str, Any] = {
        "batch_size": BATCH, "epochs": EPOCHS, "policy": "emp", "fraction": 0.5, "rounds_per_epoch": 2,
        "anneal_fraction": 0.2, "seed": 3,
    }  # fmt: skip
    return Pruner(SAMPLES, **(chosen | options))


def make_arguments(out: Path, **options: Any) -> TrainingArguments:
    chosen: dict[str, Any] = {
        "output_dir": str(out), "per_device_train_batch_size": BATCH, "num_train_epochs": EPOCHS,
        "learning_rate": 0.01, "use_cpu": True, "dataloader_pin_memory": False, "report_to": "none",
        "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "seed": 5,
    }  # fmt: skip
    return TrainingArguments(**(chosen | options))


class Noting(PrunedTrainer):
    """Notes the samples and the loss of every training batch."""

    trained: list[list[int]]
    losses: list[float]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trained, self.losses = [], []

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if "sample_idx" in inputs:
            self.trained.append(inputs["sample_idx"].tolist())
            self.losses.append(loss.item())
        return loss


def make_trainer(out: Path, pruner: Pruner | None = None, **options: Any) -> Noting:
    given = {
        name: options.pop(name)
        for name in (
            "model",
            "train_dataset",
            "eval_dataset",
            "data_collator",
            "compute_loss_func",
            "callbacks",
        )
        if name in options
    }
    chosen = {"model": make_model(), "train_dataset": make_data()} | given
    return Noting(
        args=make_arguments(out, **options), pruner=make_pruner() if pruner is None else pruner, **chosen
    )


def planned(pruner: Pruner) -> list[list[int]]:
    """The batches of a run whose losses do not matter."""
    return [pruner.batch(step) for step in range(pruner.total_steps)]


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


# ---- the Trainer's own results


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 4}, {"label_smoothing_factor": 0.2}, {"max_grad_norm": 0.1}],
    ids=str,
)
def test_unpruned_it_is_the_trainer_on_the_same_batches(options: dict[str, Any], tmp_path: Path) -> None:
    """Loss, gradient accumulation and label smoothing are the Trainer's: the same weights in the end."""
    data = make_data()
    ours = make_trainer(tmp_path, make_pruner(policy="none"), model=make_model(**NO_DROPOUT), **options)
    ours.train()
    assert ours.trained == planned(make_pruner(policy="none"))
    once = {"num_train_epochs": 1, "train_sampling_strategy": "sequential"}
    theirs = Trainer(
        model=make_model(**NO_DROPOUT),
        args=make_arguments(tmp_path, **(options | once)),
        train_dataset=[data[index] for row in ours.trained for index in row],
    )
    # it takes the mean loss of a batch for one that was divided by all samples of the step
    theirs.loss_is_scaled_for_ga = False
    theirs.train()
    assert ours.state.global_step == theirs.state.global_step
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("asked", ["num_train_epochs", "max_steps"])
def test_steps_and_learning_rate_are_those_of_the_plan(asked: str, accumulated: int, tmp_path: Path) -> None:
    pruner = make_pruner()
    steps = -(-pruner.steps_per_epoch // accumulated) * EPOCHS
    options = {"max_steps": steps, "num_train_epochs": 1} if asked == "max_steps" else {}
    trainer = make_trainer(tmp_path, pruner, gradient_accumulation_steps=accumulated, **options)
    trainer.train()
    assert pruner.step == pruner.total_steps < EPOCHS * (SAMPLES // BATCH)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert len(rates) == trainer.state.global_step == steps
    assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(0.01 / steps)
    assert trainer.lr_scheduler is not None and trainer.lr_scheduler.get_last_lr() == [0.0, 0.0]
    assert trainer.state.epoch == pytest.approx(EPOCHS)


def test_pruned_rounds_train_on_the_samples_of_the_policy(tmp_path: Path) -> None:
    """The first epoch on everything, then in each round the highest loss + 5 entropy that were heard of."""
    pruner = make_pruner()
    trainer = make_trainer(tmp_path, pruner)
    told: list[tuple[Tensor, Tensor]] = []

    def noted(outputs: Any, labels: Tensor) -> Any:
        terms = PrunedTrainer.sample_losses(trainer, outputs, labels)
        logits = outputs["logits"].detach()
        assert terms[1] is not None
        torch.testing.assert_close(terms[1], entropy(logits))
        told.append((F.cross_entropy(logits, labels, reduction="none"), terms[1]))
        return terms

    trainer.sample_losses = noted  # type: ignore[method-assign]
    trainer.train()
    full = SAMPLES // BATCH
    assert len({index for row in trainer.trained[:full] for index in row}) == full * BATCH
    first, score = pruner.steps[0] + pruner.steps[1], torch.full((SAMPLES,), torch.inf)
    # the loader reads a batch ahead, so that the round is chosen without the scores of the last one before
    for row, (loss, memory) in zip(trainer.trained[: first - 1], told, strict=False):
        score[row] = loss + 5 * memory
    count = pruner.steps[2] * BATCH
    kept = [index for row in trainer.trained[first : first + pruner.steps[2]] for index in row]
    part = make_pruner(policy="none").batches(2).flatten().sort().values  # what this round chooses from
    order = part[score[part].argsort(descending=True, stable=True)]
    assert sorted(kept) == sorted(order[:count].tolist())


def test_weights_of_infobatch_reach_the_gradient(tmp_path: Path) -> None:
    """Where every loss is 1 the means of a round, times their batch, sum up to the samples it stands for."""
    pruner = make_pruner(policy="infobatch", rounds_per_epoch=1, epochs=4)
    trainer = make_trainer(tmp_path, pruner, num_train_epochs=4)

    def ones(outputs: Any, labels: Tensor) -> tuple[Tensor, None]:
        losses = F.cross_entropy(outputs["logits"], labels, reduction="none")
        return losses / losses.detach() + 0.01 * (
            labels - 1
        ), None  # of different size, so that some are easy

    trainer.sample_losses = ones  # type: ignore[method-assign]
    trainer.train()
    first = pruner.steps[0]
    pruned = trainer.losses[first : first + pruner.steps[1]]
    assert len(pruned) < first and sum(pruned) * BATCH == pytest.approx(SAMPLES, rel=0.02)


# ---- resume


class Stop(TrainerCallback):
    """Saves after a step and ends the run, as one that was killed after its last checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize(
    ("accumulated", "stop", "workers"), [(1, 10, 0), (1, 12, 0), (1, 15, 0), (2, 5, 0), (4, 3, 0), (1, 13, 1)]
)
def test_resumed_within_an_epoch_it_trains_on_the_samples_of_the_uninterrupted_run(
    accumulated: int, stop: int, workers: int, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "gradient_accumulation_steps": accumulated, "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0,
    }  # fmt: skip
    # a loader that starts workers draws a number of torch's, one whose workers persist does not
    dropout = NO_DROPOUT if workers else {}
    whole = make_trainer(tmp_path / "whole", model=make_model(**dropout), **options)
    whole.train()
    first = make_trainer(tmp_path / "cut", model=make_model(**dropout), callbacks=[Stop(stop)], **options)
    first.train()
    assert [path.name for path in (tmp_path / "cut" / f"checkpoint-{stop}").glob("*pruner*")] == [STATE_NAME]
    second = make_trainer(tmp_path / "cut", model=make_model(**dropout), **options)
    second.train(resume_from_checkpoint=True)
    assert first.trained + second.trained == whole.trained
    assert_equal(weights(second), weights(whole))
    assert_equal(second.pruner.table(), whole.pruner.table())


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def stopped(out: Path) -> Path:
    """The checkpoint of a run that was stopped in a pruned epoch."""
    make_trainer(out, callbacks=[Stop(10)]).train()
    return out / "checkpoint-10"


def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    checkpoint = stopped(tmp_path)

    def refusal(pruner: Pruner | None = None, **options: Any) -> str:
        with pytest.raises(ValueError) as error:
            make_trainer(tmp_path, pruner, **options).train(resume_from_checkpoint=str(checkpoint))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "policy was 'emp()' and is now 'loss()'" in refusal(make_pruner(policy="loss"))
    assert "gradient_accumulation_steps" in refusal(gradient_accumulation_steps=2)
    state = checkpoint / STATE_NAME
    data = state.read_bytes()
    state.write_bytes(data[: len(data) // 2])
    assert "is damaged" in refusal()
    torch.save({"step": os.system}, state)  # what weights_only refuses to make
    assert "is damaged" in refusal()
    state.unlink()
    assert "pruner.pt is missing" in refusal()
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        make_trainer(tmp_path / "other").train(resume_from_checkpoint=True)


# ---- batches


def test_evaluation_has_no_index_and_leaves_the_pruner_alone(tmp_path: Path) -> None:
    data = make_data()
    options: dict[str, Any] = {"eval_dataset": data[:20], "eval_strategy": "steps", "eval_steps": 4}
    trainer = make_trainer(tmp_path, model=make_model(**NO_DROPOUT), **options)
    plain = make_trainer(tmp_path, model=make_model(**NO_DROPOUT))
    trainer.train()
    plain.train()
    assert trainer.trained == plain.trained
    theirs = Trainer(model=trainer.model, args=trainer.args, eval_dataset=data[:20])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"])
    assert len(trainer.predict(data[:9]).predictions) == 9  # type: ignore[arg-type]


@pytest.mark.parametrize("remove", [True, False])
def test_columns_that_the_model_does_not_take(remove: bool, tmp_path: Path) -> None:
    """Text beside the tokens: dropped by the Trainer's rule, or left to the collator."""
    data = [example | {"sentence": "never a tensor"} for example in make_data()]
    seen: list[set[str]] = []

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        seen.append(set(examples[0]))
        return {name: torch.tensor([one[name] for one in examples]) for name in ("input_ids", "labels")}

    trainer = make_trainer(tmp_path, train_dataset=data, data_collator=collate, remove_unused_columns=remove)
    trainer.train()
    assert len(trainer.trained) == trainer.pruner.total_steps
    assert seen[0] == {"input_ids", "labels"} | (set() if remove else {"sentence"})


def test_the_default_collator_and_strings(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, train_dataset=[example | {"text": "a"} for example in make_data()])
    trainer.train()
    loader = trainer.get_eval_dataloader(trainer.train_dataset)
    assert "sample_idx" not in next(iter(loader))


def test_a_pass_that_was_given_up_is_begun_again(tmp_path: Path) -> None:
    loader = make_trainer(tmp_path).get_train_dataloader()
    rows = planned(make_pruner())[: len(loader)]
    assert next(iter(loader))["sample_idx"].tolist() == rows[0]
    assert [batch["sample_idx"].tolist() for batch in loader] == rows


# ---- models


@pytest.mark.parametrize(
    ("label", "kind", "config"),
    [
        ("value", BertForSequenceClassification, {"labels": 1}),
        ("several", BertForSequenceClassification, {"problem_type": "multi_label_classification"}),
        ("several", BertForSequenceClassification, {"problem_type": "regression"}),
        ("class", BertForSequenceClassification, {}),
        ("token", BertForTokenClassification, {}),
        ("token", BertForMaskedLM, {}),
    ],
)
def test_the_loss_of_a_sample_alone_is_that_of_the_model(
    label: str, kind: Any, config: dict[str, Any], tmp_path: Path
) -> None:
    model, data = make_model(kind, **config).eval(), make_data(label)
    trainer = make_trainer(tmp_path, make_pruner(policy="loss"), model=model, train_dataset=data)
    batch = trainer.data_collator(data[:BATCH])
    batch = {
        name: value.float() if label == "value" and name == "labels" else value
        for name, value in batch.items()
    }
    with torch.no_grad():
        losses, memory = trainer.sample_losses(model(**batch), batch["labels"])
        alone = [
            model(**{name: value[i : i + 1] for name, value in batch.items()}).loss for i in range(BATCH)
        ]
    torch.testing.assert_close(losses, torch.stack(alone))
    assert memory is None
    trainer.train()
    assert trainer.pruner.step == trainer.pruner.total_steps


def test_entropy_of_tokens_is_their_mean(tmp_path: Path) -> None:
    model, data = make_model(BertForTokenClassification).eval(), make_data("token")
    trainer = make_trainer(tmp_path, model=model, train_dataset=data)
    batch = trainer.data_collator(data[:BATCH])
    with torch.no_grad():
        outputs = model(**batch)
        _, memory = trainer.sample_losses(outputs, batch["labels"])
    expected = [
        entropy(logits[labels != -100]).mean()
        for logits, labels in zip(outputs.logits, batch["labels"], strict=True)
    ]
    torch.testing.assert_close(memory, torch.stack(expected))


def test_a_mixin_over_another_trainer(tmp_path: Path) -> None:
    class Mine(PrunedTrainerMixin, Seq2SeqTrainer):
        pass

    arguments = Seq2SeqTrainingArguments(**{
        name: getattr(make_arguments(tmp_path), name)
        for name in ("output_dir", "per_device_train_batch_size", "num_train_epochs", "use_cpu",
                     "dataloader_pin_memory", "disable_tqdm", "save_strategy")
    }, report_to="none")  # fmt: skip
    trainer = Mine(
        model=make_model(BertForTokenClassification), args=arguments, pruner=make_pruner(),
        train_dataset=make_data("token"),
    )  # fmt: skip
    trainer.train()
    assert trainer.pruner.step == trainer.pruner.total_steps


def test_models_without_a_loss_of_a_sample_are_refused(tmp_path: Path) -> None:
    shifted = make_model(BertLMHeadModel, is_decoder=True)
    with pytest.raises(ValueError, match="BertLMHeadModel gives no logits that are aligned.*override"):
        make_trainer(tmp_path, model=shifted, train_dataset=make_data("token")).train()

    class Mine(BertLMHeadModel):
        """Of a name that no list has."""

    class Stranger(BertForTokenClassification):
        """Nobody's child, whose own loss is of the next token."""

        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            outputs = super().forward(input_ids)
            outputs.loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            return outputs

    for kind, options in ((Mine, {"is_decoder": True}), (Stranger, {})):
        model = make_model(kind, **options)
        with pytest.raises(ValueError, match=f"{kind.__name__} gives no logits that are aligned.*override"):
            make_trainer(tmp_path, model=model, train_dataset=make_data("token")).train()
    value = make_trainer(tmp_path, model=make_model(labels=1), train_dataset=make_data("value"))
    with pytest.raises(ValueError, match="policy emp needs the entropy of a prediction.*ucb or loss"):
        value.train()
    unlabelled = [{"input_ids": example["input_ids"]} for example in make_data()]
    with pytest.raises(ValueError, match="the batches have no labels, only"):
        make_trainer(tmp_path, train_dataset=unlabelled).train()


# ---- refusals


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from make_data()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"num_train_epochs": 5}, "the arguments ask for .* steps and the pruner plans .* in 3 epochs"),
        ({"max_steps": 1000}, "the arguments ask for 1000 steps and the pruner plans"),
        ({"per_device_train_batch_size": 4}, "batches of 4 on each of 1 processes, .*batch_size=4"),
        ({"compute_loss_func": print}, "compute_loss_func does not go with pruning"),
        ({"ignore_data_skip": True}, "ignore_data_skip does not go with pruning"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size does not go with pruning"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy .* does not go"),
        ({"train_dataset": make_data()[:60]}, "the dataset has 60 samples and the pruner 70"),
        ({"train_dataset": Endless(), "max_steps": 21}, "an IterableDataset has no samples by number"),
        ({"data_collator": lambda examples: examples}, "the data collator gives a list"),
        ({"train_dataset": None}, "training needs a train_dataset"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_would_prune_wrongly_is_refused_in_one_line(
    options: dict[str, Any], line: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, TypeError), match=line) as error:
        make_trainer(tmp_path, **options).train()
    assert "\n" not in str(error.value)


def test_a_second_run_needs_a_new_pruner(tmp_path: Path) -> None:
    pruner = make_pruner()
    make_trainer(tmp_path, pruner).train()
    with pytest.raises(ValueError, match="a new run needs a new Pruner"):
        make_trainer(tmp_path, pruner).train()


def test_fewer_steps_than_planned_are_trained_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ask for 9 steps and the pruner plans .*is cut"):
        trainer = make_trainer(tmp_path, max_steps=9)
        trainer.train()
    assert len(trainer.trained) == 9
    assert trainer.lr_scheduler is not None and trainer.lr_scheduler.get_last_lr() == [0.0, 0.0]


# ---- processes


@pytest.mark.whole
def test_two_processes_share_each_batch(tmp_path: Path) -> None:
    """accelerate deals the batches out; each process trains on its part of the pruner's, and none twice."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, str(tmp_path)], check=True, env=environment, capture_output=True, timeout=300)
    parts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert parts[0]["table"] == parts[1]["table"]
    pruner = make_pruner()
    both = [a + b for a, b in zip(parts[0]["trained"], parts[1]["trained"], strict=True)]
    assert len(both) == pruner.total_steps and all(len(set(row)) == BATCH for row in both)
    full = pruner.steps[0] + pruner.steps[1]
    assert both[:full] == planned(pruner)[:full]


def _one_process(out: Path) -> None:
    trainer = make_trainer(out / "run", per_device_train_batch_size=BATCH // 2, ddp_backend="gloo")
    trainer.train()
    table = {name: values.tolist() for name, values in trainer.pruner.table().items()}
    found = {"trained": trainer.trained, "table": table}
    (out / f"{trainer.args.process_index}.json").write_text(json.dumps(found))
    torch.distributed.barrier()  # gloo aborts a process whose peer is gone before it has taken its leave
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _one_process(Path(sys.argv[1]))
