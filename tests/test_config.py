"""Every mistake in a config is one clear line, all at once; every shipped config is valid."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from experiments import run
from ssl_emp.commands.eval_config import EvalConfig, check, parse_overrides
from ssl_emp.config import PRUNE_SECTIONS, CheckpointConfig, PretrainConfig, Section, flatten, load_config
from ssl_emp.errors import UserError

ROOT = Path(__file__).parent.parent


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_say_their_command(path: Path) -> None:
    config = load_config(path, [])
    assert config.out == f"runs/{path.stem}"
    assert path.read_text().startswith("#") and f"ssl-emp pretrain --config {path.stem}" in path.read_text()


# of experiments/run.py; glue.yaml is that of experiments/glue.py
GRIDS = [path for path in sorted((ROOT / "experiments").glob("*.yaml")) if "\nconfig: " in path.read_text()]


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_cell_of_a_shipped_grid_is_a_config_that_loads(path: Path) -> None:
    """As experiments/run.py starts it: the config file, the grid's settings and the cell's as overrides."""
    grid = yaml.safe_load(path.read_text())
    cells = run.expand(grid["cells"])
    assert cells
    for cell in cells:
        settings = grid.get("overrides", {}) | cell
        settings.pop("memory", None)  # a key of experiments/information.py and layers.py
        found = flatten(load_config(ROOT / grid["config"], run.words_of(settings)).model_dump())
        if settings.pop("monitor.tensorboard", None) is False:  # as of ssl_emp 0.1
            settings["monitor.loggers"] = []
        assert {key: found[key] for key in settings} == settings


def test_another_policy_on_the_command_line_drops_the_keys_of_the_files(tmp_path: Path) -> None:
    path = write(tmp_path, "prune: {policy: foresight, fraction: 0.4, ema: 0.6, explore: 0.2, shrink: true}")
    shrunk = load_config(path, []).prune.model_dump()
    assert (shrunk["ema"], shrunk["explore"], shrunk["shrink"]) == (0.6, 0.2, True)
    for policy, kept in (
        ("none", {}),
        ("random", {}),
        ("infobatch", {"ema": 0.6}),
        ("ucb", {"ema": 0.6, "explore": 0.2, "shrink": True}),
    ):
        found = load_config(path, [f"prune.policy={policy}"]).prune
        assert found == PRUNE_SECTIONS[policy].model_validate({"policy": policy, "fraction": 0.4} | kept)
    # of the command line itself nothing is dropped, whatever the order
    for words in (["prune.policy=random", "prune.explore=0.1"], ["prune.explore=0.1", "prune.policy=random"]):
        with pytest.raises(UserError, match="policy random has no key prune.explore"):
            load_config(path, words)
    with pytest.raises(UserError, match=r"there is no policy 'lose'; did you mean loss\?"):
        load_config(path, ["prune.policy=lose"])


@pytest.mark.parametrize(
    ("policy", "typo", "said"),
    [
        (
            "random",
            "redraw_evry",
            "policy random has no key prune.redraw_evry, did you mean prune.redraw_every?",
        ),
        ("emp", "bta", "policy emp has no key prune.bta, did you mean prune.beta?"),
        ("loss", "beta", "policy loss has no key prune.beta, which policy emp has"),
        (
            "ucb",
            "scoring_drws",
            "policy ucb has no key prune.scoring_drws, did you mean prune.scoring_draws?",
        ),
        ("emp", "layers", "prune.layers is not a key any more: no published result used it"),
    ],
)
def test_a_key_that_a_policy_does_not_have(policy: str, typo: str, said: str, tmp_path: Path) -> None:
    for path, words in (
        (write(tmp_path, f"prune: {{policy: {policy}, {typo}: 1}}"), []),
        (None, [f"prune.policy={policy}", f"prune.{typo}=1"]),
        (None, [f"prune.{typo}=1", f"prune.policy={policy}"]),
    ):
        with pytest.raises(UserError) as error:
            load_config(path, words)
        assert said in str(error.value) and "fix: " in str(error.value) and "\n" not in str(error.value)


def test_the_promised_configs_are_there() -> None:
    names = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert {"demo", "cifar10_emp", "cifar100_emp", "stl10_emp", "imagenet_emp", "folder_emp"} <= names


def test_overrides_win_and_1e_3_is_a_number(tmp_path: Path) -> None:
    path = write(tmp_path, "optimizer: {lr: 1e-3}\nprune:\n  fraction: 0.5\n")
    config = load_config(
        path,
        [
            "prune.fraction=0.7",
            "prune.policy=loss",
            "optimizer.weight_decay=1E-4",
            "data.source=a b.parquet",
            "epochs=3",
        ],
    )
    assert (config.optimizer.lr, config.prune.fraction, config.prune.policy) == (0.001, 0.7, "loss")
    assert (config.optimizer.weight_decay, config.data.source, config.epochs) == (1e-4, "a b.parquet", 3)


@pytest.mark.parametrize("text", ["a #b", "*.parquet", "x: y", "456", "true", "[1", "1e3"])
def test_text_is_taken_as_it_stands(text: str) -> None:
    assert load_config(None, [f"data.source={text}"]).data.source == text
    assert load_config(None, [f"out={text}", f"data.test_source={text}"]).data.test_source == text
    assert load_config(None, ["data.test_source=null"]).data.test_source is None


def test_a_resolved_config_reads_back_the_same(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / "demo.yaml", ["seed=3"])
    assert load_config(write(tmp_path, yaml.safe_dump(config.model_dump(), sort_keys=False)), []) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prune: {fractoin: 0.5}", "policy emp has no key prune.fractoin, did you mean prune.fraction?"),
        ("prune: emp", "prune: is 'emp', give a section such as prune: {policy: emp}"),
        ("prune: []", "prune: is [], give a section"),
        ("prune: null", "prune: is None, give a section"),
        ("temprature: 0.5", "unknown key temprature, did you mean temperature?"),
        ("xyzzy: 1", "unknown key xyzzy, known are out, seed"),
        ("prune: {fraction: 1.0}", "prune.fraction: should be less than 1 (is 1.0)"),
        ("prune: {fraction: -0.1}", "prune.fraction: should be greater than or equal to 0"),
        ("prune: {fraction: .nan}", "prune.fraction: should be a finite number"),
        ('prune: {fraction: "0.5"}', "prune.fraction: should be a valid number (is '0.5')"),
        ("prune: {fraction: null}", "prune.fraction"),
        ("prune: {beta: .inf}", "prune.beta: should be a finite number"),
        ("prune: 0.5", "prune: is 0.5, give a section"),
        ("epochs: 0", "epochs: should be greater than or equal to 1"),
        ("epochs: 1.5", "epochs: should be a valid integer"),
        ("epochs: yes", "epochs: should be a valid integer"),
        ("epochs: 010", "epochs: should be a valid integer (is '010')"),
        ("batch_size: 1", "batch_size: should be greater than or equal to 2"),
        ("temperature: 0", "temperature: should be greater than or equal to 0.001"),
        ("compile: 1", "compile: should be a valid boolean"),
        ("model: {width: 12}", "model.width: should be a multiple of 8"),
        ("model: {arch: resnet19}", "model.arch: no network is called 'resnet19'; did you mean resnet18?"),
        ("augment: {crop_scale: [0.5, 0.2]}", "crop_scale must be two rising numbers"),
        ("augment: {crop_scale: [0.5]}", "augment.crop_scale"),
        ("augment: {std: [0.2, 0, 0.2]}", "augment.std.1: should be greater than 0"),
        ("augment: {crop_padding: 2}\nprune: {scoring_size: 8}", "prune.scoring_size must be null"),
        ("augment: {size: 7}", "augment.size: should be greater than or equal to 8"),
        ("augment: {size: large}", "augment.size: should be a valid integer"),
        ("augment: {size: [16, 24]}", "augment.size is [16, 24], give pairs of a size and a share"),
        ("augment: {size: []}", "augment.size is [], give pairs"),
        ("augment: {size: [[16, 0.6, 1]]}", "give pairs"),
        ("augment: {size: [{16: 1}]}", "key 16 is not a name"),
        ("augment: {size: [{a: 1}]}", "augment.size is [{'a': 1}], give pairs"),
        ("augment: {size: [[0.6, 16], [1, 24]]}", "give sizes of 8 to 1024 whole pixels"),
        ("augment: {size: [[16, 0.6], [2000, 1]]}", "give sizes of 8 to 1024 whole pixels"),
        ("augment: {size: [[16, 60], [24, 100]]}", "give shares of the epochs, above 0 and up to 1"),
        ("augment: {size: [[16, .nan], [24, 1]]}", "give shares of the epochs, above 0 and up to 1"),
        ("augment: {size: [[16, 0.6], [24, 0.9]]}", "give a last share of 1"),
        ("augment: {size: [[16, 0.6], [20, 0.6], [24, 1]]}", "give shares that rise"),
        ("augment: {size: [[24, 0.6], [16, 1]]}", "give sizes that do not fall"),
        ("seed: 1\nseed: 2", "line 2: key 'seed' stands twice"),
        ("epochs: [1,", "is not valid YAML, line"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("x: !!python/object/apply:os.system [echo]", "is not valid YAML, line 1"),
        ("- 1\n- 2", "holds a list"),
        ("1: 2", "key 1 is not a name"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        load_config(path, [])
    message = str(error.value)
    assert said in message and "fix: " in message and "\n" not in message and str(path) in message


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^3 problems: .*epochs.*fractoin.*temprature|^3 problems: "
    ) as error:
        load_config(write(tmp_path, "epochs: 0\ntemprature: 1\nprune: {fractoin: 1}"), [])
    assert all(word in str(error.value) for word in ("epochs", "temprature", "prune.fractoin"))


@pytest.mark.parametrize(
    "override", ["epochs", "=3", "epochs.=3", "epochs.x=3", "prune.fraction=", "prune.fraction=[1,"]
)
def test_broken_overrides(override: str) -> None:
    with pytest.raises(UserError):
        load_config(ROOT / "configs" / "demo.yaml", [override])


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00binary", b"\x00" * 10, b"a: 1\n" * 300_000])
def test_files_that_are_no_config(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="run.yaml"):
        load_config(path, [])


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, ""), ["out=x"]) == PretrainConfig(out="x")


def test_flatten() -> None:
    nested: dict[str, Any] = {"a": 1, "b": {"c": {"d": 2}, "e": [3]}}
    assert flatten(nested) == {"a": 1, "b.c.d": 2, "b.e": [3]}


def numbers_without_an_end(model: type[BaseModel]) -> list[str]:
    """Places in the schema of `model` where a number may be as small or as large as it likes."""

    def walk(node: Any, place: str) -> Iterator[str]:
        if isinstance(node, list):
            for number, child in enumerate(node):
                yield from walk(child, f"{place}/{number}")
        if not isinstance(node, dict):
            return
        if node.get("type") in ("integer", "number"):
            ends = (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))
            if not all(any(isinstance(node.get(name), int | float) for name in names) for names in ends):
                yield place
        for name, child in node.items():
            yield from walk(child, f"{place}/{name}") if name != "default" else ()

    return list(walk(model.model_json_schema(), ""))


def test_every_number_has_two_ends() -> None:
    assert numbers_without_an_end(PretrainConfig) == []
    assert numbers_without_an_end(EvalConfig) == []

    class Inner(Section):
        fine: Annotated[int, Field(ge=0, le=3)] | None = None
        shares: list[Annotated[float, Field(ge=0)]] = []

    class Careless(Section):
        inner: Inner = Inner()
        count: int | Literal["auto"] = 1

    assert [place.rpartition("/properties/")[2] for place in numbers_without_an_end(Careless)] == [
        "shares/items",
        "count/anyOf/0",
    ]


@pytest.mark.parametrize(
    "override",
    [
        "timeout_seconds=1e14",
        "timeout_seconds=9e9",
        "timeout_seconds=0",
        "timeout_seconds=-1",
        "devices=100000",
        "batch_size=4000000000",
        "epochs=9000000000",
        "max_bad_steps=9223372036854775807",
        "checkpoint.every_minutes=1e300",
        "checkpoint.every_steps=9223372036854775807",
        "optimizer.lr=1e300",
        "optimizer.weight_decay=1e38",
        "temperature=1e-30",
        "temperature=1e30",
        "prune.warmup_epochs=9223372036854775807",
        "prune.scoring_draws=1000000000",
        "monitor.knn_images=9223372036854775807",
        "augment.blur_sigma=[0.1, 1e30]",
        "data.max_images=9223372036854775807",
    ],
)
def test_a_number_beyond_its_end_is_one_line_with_the_range(override: str) -> None:
    with pytest.raises(UserError, match="allowed: .*value") as error:
        load_config(None, [override])
    assert (
        "\n" not in str(error.value)
        and override.partition("=")[0] in str(error.value)
        and "fix: " in str(error.value)
    )


@pytest.mark.parametrize(
    "override",
    [
        "knn.num_neighbors=9000000000",
        "knn.num_neighbors=[1, 9000000000]",
        "knn.temperature=1e-30",
        "fewshot.num_draws=1000000000",
        "finetune.lr=1e30",
        "finetune.batch_size=4000000000",
        "batch_size=4000000000",
        "linear.max_iter=9000000000",
        "finetune.warmup_epochs=1e30",
    ],
)
def test_so_it_is_in_evaluation(override: str) -> None:
    with pytest.raises(UserError, match="should be (less|greater) than or equal to") as error:
        check(EvalConfig, parse_overrides([override]), "the command line")
    assert "\n" not in str(error.value) and override.partition("=")[0] in str(error.value)


def test_the_largest_numbers_overflow_nowhere() -> None:
    """What the product makes of them stays within 64 bits, and within what the standard library calls a
    duration.
    """
    fields, checkpoint = PretrainConfig.model_fields, CheckpointConfig.model_fields

    def highest(field: FieldInfo) -> float:
        return float(next(found.le for found in field.metadata if hasattr(found, "le")))

    assert timedelta(seconds=highest(fields["timeout_seconds"])).days == 7
    assert timedelta(minutes=highest(checkpoint["every_minutes"])).days > 365
    assert highest(fields["epochs"]) * 10**12 < 2**63 and highest(fields["batch_size"]) * 10**12 < 2**63
