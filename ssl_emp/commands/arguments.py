"""The command lines of pretrain and evaluate, which are read and explained before torch is imported.

What the commands do is in pretrain.py, evaluate.py and predict.py beside this file. Other commands have their
`parser` in their own file.
"""

import argparse

from ssl_emp.errors import Parser, path_argument
from ssl_emp.text import command_line

PRETRAIN = """Pretrain an image encoder with SimCLR, and train each epoch on the samples worth it:
prune.policy says by which rule (emp: arXiv 2408.16031).

    {pretrain} --config demo
    {pretrain} --config folder_emp data.source=./images prune.fraction=0.5 out=runs/mine
    {pretrain} --config folder_emp data.source=./images --dry-run    # what would happen, and the views
    {pretrain} --resume runs/mine

Exit codes: 0 done, 2 you can fix it, 3 the run failed with its last checkpoint intact, 130/143 stopped by
SIGINT/SIGTERM after saving.
"""

EVALUATE = """Judge encoders: encoder -> features -> knn | linear | fewshot | finetune | diagnose | transfer
-> one table, and the rows as JSON.

    {evaluate} ENCODER [ENCODER ...] EVALUATOR [EVALUATOR ...] [key=value ...] [--out DIR]

ENCODER    a run directory, an encoder directory (model.safetensors and config.json), `random` (the same
           network, untrained), `pixels` (no network at all), `timm:NAME`, `torchvision:NAME`. What a run of
           model.init began from, `start`, is judged beside it (start=false: not)
EVALUATOR  `knn` (every k of knn.num_neighbors from one search), `linear` (linear.protocol: lbfgs, cached or
           augmented), `fewshot` (few labels, several draws; fewshot.finetune trains the network too),
           `finetune` (the whole network), `transfer` (transfer.suite, a YAML file of target data sets or the
           name of a shipped one). Without labels and without a test split: `diagnose` (collapse, effective
           rank, neighbours, a map, embeddings.parquet). Vectors of any images: {embed}
key=value  data.* as for pretraining; model.arch, args, width and stem (of `random`); the sections knn,
           linear, fewshot, finetune, diagnose, transfer; seed, device, batch_size, cache_dir (all of them in
           ssl_emp/commands/eval_config.py)

A run is judged on the data in its own config.yaml, all others on that of the first run named, without one on
mnist5k; data.source replaces the whole of it. data.max_images limits the train split only; data.holdout=0.2
makes a test split where labels come without one. Features are computed once for an encoder and a data set and
kept in cache_dir. Rows go to RUN/eval/EVALUATOR.json, or to DIR, as soon as an evaluator is done, and are
printed at the end. What cannot be judged is a row with the reason, and the rest goes on. Exit codes: 0 all
was judged, 2 something was not that the user can see to (all other rows are kept), 3 another process was
lost, 1 an error of the program, 128+n stopped by signal n (what was judged is kept).

    {evaluate} predict RUN/eval/classifier-finetune IMAGES [--out FILE]

says which class each image is, by a classifier that finetune.save=true or linear.save=true kept
({evaluate} predict --help).

    torchrun --nproc-per-node 8 -m ssl_emp evaluate ...

Several processes share the forward passes that make the features, each on a GPU of its own where there are
GPUs; the first one fits on them and writes. The numbers are those of one process.
"""

PREDICT = """Say of every image which class it is, by a classifier that finetune.save=true or
linear.save=true kept.

CLASSIFIER  its folder, such as RUN/eval/classifier-finetune
IMAGES      an image, a folder of images, parquet, a name such as cifar10: with labels or without
key=value   top_k (so many classes an image, the likeliest first), split (train or test of what has both;
            all), max_pixels (of an image), batch_size, device

CSV on standard output, or in FILE: name, class, probability (and class_2, probability_2, ... for top_k above
1), problem. An image that cannot be read has a row too, without a class: `problem` says why. A name is the
path below IMAGES, or FILE.parquet#ROW; where several IMAGES are given, it begins with the one it is from.
"""


# what does the work is in evaluators.py and transfer.py
EVALUATOR_NAMES = ("knn", "linear", "fewshot", "finetune", "diagnose", "transfer")


def evaluate_usage() -> str:
    words = f"ENCODER [ENCODER ...] {'|'.join(EVALUATOR_NAMES)} [...] [key=value ...], see --help"
    return f"{command_line('evaluate')} {words}"


def predict_usage() -> str:
    return f"{command_line('evaluate')} predict CLASSIFIER IMAGES [IMAGES ...] [key=value ...] [--out FILE]"


def pretrain_parser(words: list[str] | None = None) -> Parser:
    parser = Parser(
        prog=command_line("pretrain"),
        description=PRETRAIN.format(pretrain=command_line("pretrain")),
        epilog="Every key with its value is printed by --dry-run; override it with key=value.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=path_argument, metavar="FILE", help="YAML file, or the name of a shipped one"
    )
    parser.add_argument(
        "--resume", type=path_argument, metavar="RUN", help="go on with the run in this directory"
    )
    parser.add_argument(
        "--auto-resume",
        action="store_true",
        help="start, or go on where the run directory has a run: for restarts",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would happen, train nothing")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as epochs=20 prune.fraction=0.5"
    )
    return parser


def evaluate_parser(words: list[str] | None = None) -> Parser:
    """Of `evaluate`, and of `evaluate predict` where that is what the words begin with."""
    if words is not None and words[:1] == ["predict"]:  # write ./predict for a folder of that name
        return predict_parser()
    names = {name: command_line(name) for name in ("evaluate", "embed")}
    parser = Parser(
        prog=names["evaluate"],
        description=EVALUATE.format(**names),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=evaluate_usage(),
    )
    parser.add_argument("words", nargs="*", metavar="ENCODER | EVALUATOR | key=value")
    parser.add_argument(
        "--out", type=path_argument, metavar="DIR", help="write knn.json and linear.json here instead"
    )
    return parser


def predict_parser() -> Parser:
    parser = Parser(
        prog=f"{command_line('evaluate')} predict",
        description=PREDICT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=predict_usage(),
    )
    parser.add_argument("words", nargs="*", metavar="CLASSIFIER IMAGES | key=value")
    parser.add_argument(
        "--out", type=path_argument, metavar="FILE", help="write the CSV here, not to standard output"
    )
    return parser


# name of a command -> its parser, for the words that follow the name
PARSERS = {"pretrain": pretrain_parser, "evaluate": evaluate_parser}
