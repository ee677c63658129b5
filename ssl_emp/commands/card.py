"""The model card of an encoder, README.md beside its weights: of what it was made, how good it is, its use.

It is made from the files of the run alone, so that pretraining, evaluation and `push` write the same one. Its
first line after the front matter is MARK; without that line it is somebody's own text, and is left alone.

What goes into it may be read by everyone: of paths the last part only, and no name of an image.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import yaml

from linear_eval.errors import first_line
from ssl_emp._version import __version__
from ssl_emp.backbones import described, is_own
from ssl_emp.commands.rows import LOCK, Row, locked
from ssl_emp.commands.subjects import plan_behind
from ssl_emp.config import parse_yaml
from ssl_emp.errors import UserError
from ssl_emp.run.report import duration, read_metrics
from ssl_emp.safe_files import LARGE, check_inner, check_regular, read_json, read_text, write_atomically
from ssl_emp.text import markdown_text, shorten

NAME = "README.md"
MARK = "<!-- Written by ssl_emp, and renewed by it. Remove this line to keep a text of your own. -->"
LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,60}")
FRONT = re.compile(r"---\n(.*?\n)---\n", re.DOTALL)
LICENCE_PART = "## Licence\n"
HERE = "path/to/this/folder"  # in snippets, until it is known where the folder is
EVALUATORS = ("knn", "linear", "fewshot", "finetune", "transfer", "diagnose")
BASELINES = ("random", "pixels")


def renew_card(run: Path, weights: str | None = None, licence: str | None = None) -> str:
    """Write RUN/encoder/README.md, or leave somebody's own; the text that is there now.

    Args:
        weights: the hash of the encoder in the rows of evaluations, of which its table is made; None: it is
            computed where there are rows.
        licence: of the weights, such as `mit`; None: as the card that is there says.

    Raises:
        UserError: the run's files cannot be read, or a folder in it is a link.
        OSError: it cannot be written.
    """
    folder, rows = check_inner(run, "encoder"), check_inner(run, "eval")
    # two evaluations may end together, and rows of both are in the card of the later one
    with locked(rows / LOCK) if rows.is_dir() else nullcontext():
        before = own_text(folder)
        if before is not None:
            return before
        if weights is None and rows.is_dir():
            weights = hash_of(folder)
        text = card_of(folder, run, weights=weights, licence=licence)
        write_atomically(folder / NAME, text.encode())
    return text


def hash_of(folder: Path) -> str | None:
    """What rows call the weights in a folder; None of a network that only its owner can build."""
    from ssl_emp.commands.evaluators import weights_hash
    from ssl_emp.model import load_encoder

    with suppress(UserError):
        return weights_hash(load_encoder(folder))
    return None


def try_to_renew(run: Path, weights: str | None, tell: Callable[[str], None]) -> None:
    """`renew_card` after hours of work, which no card is worth losing: what goes wrong is told in a line."""
    try:
        renew_card(run, weights)
    except Exception as error:  # files of a run may hold anything
        what = f"the model card {run / 'encoder' / NAME} was not written"
        tell(f"warning   {what} ({type(error).__name__}: {first_line(error)})")


def card_for_push(folder: Path, run: Path | None, weights: str, licence: str | None, repo_id: str) -> str:
    """The card that goes to the hub. An encoder directory that was copied out of its run keeps what the card
    in it says of the run.

    Raises:
        UserError: the licence is none, or the card is somebody's own and would have to be changed.
    """
    own = own_text(folder)
    if own is not None:
        if licence is not None:
            what = f"{folder / NAME} is a text of your own, which --license does not change"
            raise UserError(what, "write `license: ...` into its front matter, and leave --license out")
        return own
    if run is None and (folder / NAME).exists():
        return with_licence(read_text(folder / NAME), licence)
    return card_of(folder, run, weights=weights, licence=licence, repo_id=repo_id)


def with_licence(text: str, licence: str | None) -> str:
    """A card of ours under another licence, which its front matter and its last part state."""
    found = FRONT.match(text)
    values = parse_yaml(found[1], NAME) if found else None
    if licence is None or found is None or not isinstance(values, dict):
        return text
    values = {"license": checked_licence(licence)} | {k: v for k, v in values.items() if k != "license"}
    body = text[found.end() :].partition(LICENCE_PART)[0]
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n{body}{licence_line(values['license'], None)}"


def own_text(folder: Path) -> str | None:
    """A card that somebody has written or taken over; None where there is none, or only ours."""
    path = folder / NAME
    if not path.exists():
        return None
    text = read_text(path)
    return None if is_ours(text) else text


def is_ours(card: str) -> bool:
    return MARK in card


def card_of(
    folder: Path,
    run: Path | None,
    *,
    weights: str | None = None,
    licence: str | None = None,
    repo_id: str | None = None,
) -> str:
    """The card of the encoder in `folder`.

    Args:
        run: the run that it is of; None: it is known by its config.json alone.
        weights, licence: see `renew_card`.
        repo_id: `user/name` where it is pushed to, for the snippets.
    """
    encoder = read_json(folder / "config.json")
    spec = encoder["ssl_emp"]
    licence = checked_licence(licence) if licence is not None else licence_of(folder)
    title = repo_id.rpartition("/")[2] if repo_id else (run or folder).resolve().name
    facts = Facts(run) if run is not None else None
    rows = [] if run is None or weights is None else rows_of(run, weights)
    front = front_matter(spec, title, rows, licence)
    parts = [
        f"---\n{front}---\n{MARK}\n\n# {markdown_text(title)}\n",
        what_it_is(encoder, facts),
        *([] if facts is None else [facts.data(), facts.recipe(), facts.pruning()]),
        evaluation(rows, run),
        how_to_load(spec, repo_id),
        licence_line(licence, facts),
    ]
    return "\n".join(parts)


def what_it_is(encoder: Mapping[str, Any], facts: "Facts | None") -> str:
    spec = encoder["ssl_emp"]
    size, dim = spec["image_size"], encoder["num_features"]
    how = "" if facts is None else f", {facts.objective()}"
    return (
        f"An image encoder{how}: {markdown_text(described(spec))}. It takes images of "
        f"{size} x {size} pixels and gives {dim} features for each.\n"
    )


# ---- the front matter --------------------------------------------------------------------------------------


def front_matter(spec: Mapping[str, Any], title: str, rows: list[Row], licence: str | None) -> str:
    """YAML, as the Hugging Face hub reads it."""
    in_timm = loads_in_timm(spec)
    found: dict[str, Any] = {} if licence is None else {"license": licence}
    found |= {
        "library_name": "timm" if in_timm else "ssl_emp",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["ssl_emp", "self-supervised-learning", "data-pruning", *(["timm"] if in_timm else [])],
    }
    results = [
        {
            "task": {"type": "image-classification", "name": row["evaluator"]},
            "dataset": {"type": "custom", "name": data_label(row["data"])},
            "metrics": [
                {"type": "accuracy", "name": f"{row['evaluator']} {row['metric']}", "value": row["value"]}
            ],
        }
        for row in rows
        if row["is_own"] and row["metric"] == "top1 %"
    ]
    if results:
        found["model-index"] = [{"name": title, "results": results}]
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=False)


def loads_in_timm(spec: Mapping[str, Any]) -> bool:
    """Whether timm builds this network from config.json: its own, and ResNets as they were published."""
    arch = spec["arch"]
    if is_own(arch):
        return (spec["width"], spec["stem"]) == (64, "imagenet")
    return bool(arch.startswith("timm:"))


def checked_licence(text: str) -> str:
    """An identifier as the hub has them. Raises UserError."""
    if not LICENCE.fullmatch(text):
        fix = "give an identifier, such as apache-2.0, mit, cc-by-nc-4.0 or other"
        raise UserError(f"--license {text!r} is no identifier of a licence", fix)
    return text.lower()


def licence_of(folder: Path) -> str | None:
    """The licence that the card in a folder states."""
    with suppress(UserError, yaml.YAMLError):
        found = FRONT.match(read_text(folder / NAME))
        values = parse_yaml(found[1], NAME) if found else None
        given = values.get("license") if isinstance(values, dict) else None
        return given if isinstance(given, str) and LICENCE.fullmatch(given) else None
    return None


def licence_line(licence: str | None, facts: "Facts | None") -> str:
    if licence is None:
        line = "Not given. Ask whoever trained these weights before you use them."
    else:
        line = f"{markdown_text(licence)}, of the weights."
    if facts is not None and facts.start():
        line += f" They were trained on from {facts.start()}, whose licence may bind them too."
    return f"{LICENCE_PART}\n{line}\n"


# ---- what the run says -------------------------------------------------------------------------------------


class Facts:
    """A run's own files in words. Values of a stranger's run may be anything: each is shown as text."""

    def __init__(self, run: Path) -> None:
        self.run = run
        values = parse_yaml(read_text(run / "config.yaml"), str(run / "config.yaml"))
        self.config: dict[str, Any] = values if isinstance(values, dict) else {}
        rows = read_metrics(run)
        self.last: dict[str, Any] = rows[-1] if rows else {}

    def section(self, name: str) -> dict[str, Any]:
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    def objective(self) -> str:
        if self.config.get("objective") == "supervised":
            return "trained with labels"
        return "pretrained without labels by SimCLR"

    def start(self) -> str:
        """The weights that it began from; empty where there were none."""
        init = self.section("model").get("init")
        if not isinstance(init, str):
            return ""
        return markdown_text(init if init.startswith("timm:") else short_path(init))

    def data(self) -> str:
        data = self.section("data")
        source = "images given in Python" if data.get("kind") == "object" else short_path(data.get("source"))
        lines = [("images", source), ("number of images", self.num_images())]
        lines += [("stored size", pixels(data.get("image_size")))] if data.get("image_size") else []
        if data.get("max_images") is not None:
            lines.append(("subset", f"{data['max_images']} drawn by seed {data.get('subset_seed')}"))
        if self.config.get("objective") == "supervised" and data.get("label_noise"):
            lines.append(("labels made wrong", f"{data['label_noise']:.1%}"))
        return "## Data\n\n" + table(lines)

    def num_images(self) -> str | None:
        """Rows of samples.parquet: all images that there were, pruned or not."""
        import pyarrow.parquet as pq

        path = self.run / "pruning" / "samples.parquet"
        with suppress(Exception):  # missing or damaged, in a dozen types
            check_regular(path, LARGE)
            return f"{pq.read_metadata(path).num_rows:,}"
        return None

    def recipe(self) -> str:
        optimizer, views, model = (self.section(name) for name in ("optimizer", "augment", "model"))
        begins = self.start()
        contrasts, behind = self.config.get("objective") != "supervised", plan_behind(self.run)
        lines = [
            ("objective", f"SimCLR, {self.config.get('loss')}" if contrasts else "cross-entropy"),
            ("temperature", self.config.get("temperature") if contrasts else None),
            ("label smoothing", None if contrasts else self.config.get("label_smoothing")),
            ("projection", model.get("projection_dim") if contrasts else None),
            ("epochs", "{} of {}".format(*behind) if behind else self.config.get("epochs")),
            ("batch size", self.config.get("batch_size")),
            ("optimiser", optimizer.get("name")),
            ("momentum", None if optimizer.get("name") == "adamw" else optimizer.get("momentum")),
            ("learning rate", f"{optimizer.get('lr')} at its peak, {optimizer.get('schedule')}"),
            ("weight decay", optimizer.get("weight_decay")),
            ("crops", f"scale {rounded(views.get('crop_scale'))}, ratio {rounded(views.get('crop_ratio'))}"),
            (
                "colours",
                f"jitter {views.get('jitter_prob')}, grey {views.get('gray_prob')}, "
                f"blur {views.get('blur_prob')}, solarize {views.get('solarize_prob')} (probabilities)",
            ),
            ("seed", self.config.get("seed")),
            ("written by", f"ssl_emp {__version__}{self.packages()}"),
        ]
        text = "## Recipe\n\n" + table(lines)
        return f"{text}\nIt began from the weights {begins}.\n" if begins else text

    def packages(self) -> str:
        with suppress(UserError, AttributeError, KeyError, TypeError):
            found = read_json(self.run / "environment.json")
            return f", torch {found['packages']['torch']} on {found['device']}"
        return ""

    def pruning(self) -> str:
        prune, last = self.section("prune"), self.last
        seen, share = last.get("samples_seen"), last.get("real_share")
        lines: list[tuple[str, Any]] = [("policy", prune.get("policy"))]
        # an unpruned run has these keys too, and looks at none of them
        if not isinstance(share, float) or share < 1:
            lines += [
                ("left out of a pruned epoch (s)", percent(prune.get("fraction"))),
                ("first epochs on everything", prune.get("warmup_epochs")),
                ("last epochs on everything", percent(prune.get("anneal_fraction"))),
                ("beta", prune.get("beta")),
            ]
        if isinstance(seen, int) and isinstance(share, float) and 0 < share:
            unpruned = round(seen / share)
            lines.append(("samples seen", f"{seen:,} of {unpruned:,} without pruning ({share:.1%})"))
        seconds = last.get("training_seconds")
        lines.append(("time of training", duration(seconds) if isinstance(seconds, float) else None))
        text = "## Pruning\n\n" + table(lines)
        return f"{text}\nPolicies and their keys: docs/method.md of ssl_emp; EMP is arXiv 2408.16031.\n"


def table(lines: list[tuple[str, Any]]) -> str:
    """Two columns; what is None has no line."""
    rows = [f"| {name} | {cell(value)} |\n" for name, value in lines if value is not None]
    return "| | |\n|---|---|\n" + "".join(rows)


def cell(value: Any) -> str:
    """A value of a file as text; a stranger's may have megabytes."""
    return markdown_text(shorten(str(value), 1000))


def percent(value: Any) -> str | None:
    return f"{value:.1%}" if isinstance(value, int | float) else None


def rounded(value: Any) -> str:
    """A number or a range, with the digits that a reader wants."""
    if isinstance(value, list):
        return " to ".join(map(rounded, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def pixels(value: Any) -> str:
    return f"{value} pixels a side"


def short_path(path: Any) -> str:
    """The last part of a path, or a name as it is; nothing of where it lies on this machine."""
    text = str(path)
    if not ("/" in text or text.startswith(("~", "."))):
        return text
    last = text.rstrip("/").rpartition("/")[2]
    return "images in a folder" if last in ("", ".", "..") or last.startswith("~") else last


# ---- evaluations -------------------------------------------------------------------------------------------


def rows_of(run: Path, weights: str) -> list[Row]:
    """Rows with a value in RUN/eval of these weights, and of what has learned nothing beside them."""
    found = []
    for evaluator in EVALUATORS:
        path = run / "eval" / f"{evaluator}.json"
        with suppress(UserError):  # missing, or damaged
            rows = read_json(path, LARGE) if path.is_file() else []
            for row in rows if isinstance(rows, list) else []:
                if isinstance(row, dict) and isinstance(row.get("value"), int | float):
                    is_own = row.get("weights") == weights
                    if is_own or row.get("encoder") in BASELINES:
                        found.append(
                            {"evaluator": evaluator, "data": "", "metric": ""} | row | {"is_own": is_own}
                        )
    measured = {(row["evaluator"], row["data"], row["metric"]) for row in found if row["is_own"]}
    return [row for row in found if (row["evaluator"], row["data"], row["metric"]) in measured]


def evaluation(rows: list[Row], run: Path | None) -> str:
    if not rows:
        how = "" if run is None else " `ssl-emp evaluate RUN knn linear` fills this part"
        return f"## Evaluation\n\nNot evaluated yet.{how and f'{how}.'}\n"
    columns = ("encoder", "evaluator", "data", "metric", "value", "n_test", "seed", "protocol")
    lines = ["| " + " | ".join(columns) + " |\n", "|" + "---|" * len(columns) + "\n"]
    for row in rows:
        value, std = row["value"], row.get("std")
        digits = 2 if str(row["metric"]).endswith("%") else 4
        shown = f"{value:.{digits}f}" if isinstance(value, float) else str(value)
        shown += f" ± {std:.{digits}f}" if isinstance(std, float) else ""
        cells = {
            "encoder": "this one" if row["is_own"] else row["encoder"],
            "data": data_label(row["data"]),
            "value": shown,
            "protocol": without_paths(str(row.get("protocol", ""))),
        }
        texts = [str(cells.get(name, row.get(name, ""))) for name in columns]
        lines.append("| " + " | ".join(map(cell, texts)) + " |\n")
    more = "`random` is the same network untrained, `pixels` is no network.\n"
    return "## Evaluation\n\n" + "".join(lines) + (f"\n{more}" if any(not r["is_own"] for r in rows) else "")


def data_label(described: Any) -> str:
    """Data as a row describes them (`/home/me/photos 32px, test ...`), without places."""
    return ", ".join(
        re.sub(r"^(test )?.*/(?=.)", r"\1", part.rstrip("/")) for part in str(described).split(", ")
    )


def without_paths(text: str) -> str:
    """A text in which absolute paths are cut to their last part."""
    return re.sub(r"(?<![\w.)/])[/~][^\s,;|]*?([^\s,;|/]+)/?(?=[\s,;|)]|$)", r"\1", text)


# ---- loading -----------------------------------------------------------------------------------------------


def how_to_load(spec: Mapping[str, Any], repo_id: str | None) -> str:
    """Snippets that run as they are, but for the path and the picture."""
    if repo_id is None:
        fetch, place = "", f'"{HERE}"'
    else:
        fetch = "from huggingface_hub import snapshot_download\n\n"
        place = f'snapshot_download("{repo_id}")'
    text = "## Use\n\n"
    if str(spec["arch"]).startswith("custom:"):
        text += "The network is a module of whoever trained it, `NETWORK`: one like it is needed.\n\n"
        backbone = ", backbone=NETWORK"
    else:
        backbone = ""
    text += (
        "With ssl_emp, which resizes and normalises as in training and evaluation:\n\n"
        f"```python\n{fetch}from ssl_emp import load_encoder\n\n"
        f"encoder = load_encoder({place}{backbone})\n"
        'vectors = encoder.embed(["picture.png"])  # (N, D) float32\n```\n'
    )
    if loads_in_timm(spec):
        source = f"hf-hub:{repo_id}" if repo_id else f"local-dir:{HERE}"
        text += (
            "\nWith timm:\n\n```python\nimport timm\nimport torch\nfrom PIL import Image\n\n"
            f'network = timm.create_model("{source}", pretrained=True).eval()\n'
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))\n"
            'with Image.open("picture.png") as image, torch.inference_mode():\n'
            '    vectors = network(transform(image.convert("RGB"))[None])  # (1, D) float32\n```\n\n'
            "timm cuts out the centre at whole pixels, so vectors of oblong pictures differ a little.\n"
        )
    return text
