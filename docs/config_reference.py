"""docs/config_reference.md from the schemas: every key with its type, range, default and meaning.

    python docs/config_reference.py          # writes the page; a test compares it

What a key means is the comment at its field: the lines right above it, or those beside it.
"""

import ast
import functools
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # of this checkout

from ssl_emp.commands.eval_config import EvalConfig
from ssl_emp.config import PRUNE_SECTIONS, PretrainConfig, Section
from ssl_emp.prune.policies import POLICIES
from ssl_emp.safe_files import write_atomically

PAGE = Path(__file__).parent / "config_reference.md"
HEAD = """# Every key

Made by `python docs/config_reference.py` from [ssl_emp/config.py](../ssl_emp/config.py),
[the policies](../ssl_emp/prune/policies.py) and
[ssl_emp/commands/eval_config.py](../ssl_emp/commands/eval_config.py), which check every value. `null` is
YAML's word for nothing. A number is never text: `"0.5"` is refused. In Python the same keys go by
[the arguments of `pretrain` and `evaluate`](python.md#settings).
"""
EVALUATION = """
## Keys of evaluation

Of `evaluate.py`, which also takes `data.*` and `model.*` as above: `data.*` replaces what a run was trained
on, `model.*` is the network of `random`.
"""
PRUNING = """
### prune

`prune.policy` (default `emp`) is one of {policies}.
A policy has its own keys, and those of another are refused; [choosing a policy](choosing.md) says which to
take.
"""


# ---- what a key means --------------------------------------------------------------------------------------


def comments(owner: type) -> dict[str, str]:
    """Field -> its comment, of a class and those that it inherits from."""
    found: dict[str, str] = {}
    for base in owner.__mro__[::-1]:
        if base.__module__.startswith("ssl_emp"):
            found |= comments_of_module(base.__module__).get(base.__name__, {})
    return found


@functools.cache
def comments_of_module(module: str) -> dict[str, dict[str, str]]:
    """Class -> field -> its comment."""
    source = inspect.getsource(sys.modules[module])
    lines = source.splitlines()
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return {node.name: dict(_own_comments(node, lines)) for node in classes}


def _own_comments(owner: ast.ClassDef, lines: list[str]) -> Iterator[tuple[str, str]]:
    for field in owner.body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        first, last = field.lineno - 1, field.end_lineno or field.lineno
        parts: list[str] = []
        for line in lines[first - 1 :: -1]:
            if not line.strip().startswith("#"):
                break
            parts.insert(0, line)
        parts += [line.partition("  # ")[2] for line in lines[first:last]]
        words = " ".join(part.strip("# ") for part in parts)
        text = " ".join(re.sub(r"type: ignore(\[[\w-]+\])?( +#)?", "", words).split())
        if text:
            yield field.target.id, text


# ---- type, range and default -------------------------------------------------------------------------------


def kind(node: dict[str, Any], schema: dict[str, Any]) -> str:
    """`0 <= number < 1`, `"auto" or "none"`, `list of 2 numbers`: what the JSON schema of a field allows."""
    if "$ref" in node:
        return kind(schema["$defs"][node["$ref"].rpartition("/")[2]], schema)
    if "anyOf" in node:
        return " or ".join(dict.fromkeys(kind(option, schema) for option in node["anyOf"]))
    if "const" in node or "enum" in node:
        return ", ".join(f"`{yaml_text(value)}`" for value in node.get("enum", [node.get("const")]))
    if node.get("type") == "array":
        least, most = node.get("minItems"), node.get("maxItems")
        count = f"{least} of: " if least and least == most else "list of: "
        return count + kind(node.get("items", {}), schema)
    word = WORDS.get(node.get("type", ""), "anything")
    low = next((f"{number(node[name])} {sign} " for name, sign in LOW.items() if name in node), "")
    high = next((f" {sign} {number(node[name])}" for name, sign in HIGH.items() if name in node), "")
    step = f", a multiple of {node['multipleOf']}" if "multipleOf" in node else ""
    return f"{low}{word}{high}{step}"


def number(value: float) -> str:
    whole = isinstance(value, int) and abs(value) < 2**53  # beyond it a range is one of bits, not of counts
    return f"{value:,}" if whole else f"{value:.3g}"


WORDS = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "truth value",
    "null": "`null`",
    "object": "keys and values",
}
LOW = {"minimum": "≤", "exclusiveMinimum": "<"}
HIGH = {"maximum": "≤", "exclusiveMaximum": "<"}


def yaml_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def rows(section: type[Section], prefix: str = "", meanings: dict[str, str] | None = None) -> list[list[str]]:
    """[key, what it may be, default, meaning] of the plain fields of a section."""
    schema = section.model_json_schema()
    meanings = comments(section) if meanings is None else meanings
    found = []
    for name, field in section.model_fields.items():
        if not isinstance(field.default, Section):
            default = "(needed)" if field.is_required() else f"`{yaml_text(field.default)}`"
            cells = [
                f"`{prefix}{name}`",
                kind(schema["properties"][name], schema),
                default,
                meanings.get(name, ""),
            ]
            found.append([cell.replace("|", "\\|").replace("<n", "\\<n") for cell in cells])
    return found


def markdown(lines: list[list[str]], *more: str) -> str:
    head = ["key", "may be", "default", "meaning", *more]
    every = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every) + "\n"


# ---- the page ----------------------------------------------------------------------------------------------


def pruning_rows() -> list[list[str]]:
    """The keys of all policies, and which have them; one that policies have otherwise has several lines."""
    policies: dict[tuple[str, ...], list[str]] = {}
    for policy, section in PRUNE_SECTIONS.items():
        for line in rows(section, "prune.", comments(section) | comments(POLICIES[policy])):
            if line[0] != "`prune.policy`":
                policies.setdefault(tuple(line), []).append(policy)
    keys = list(dict.fromkeys(line[0] for line in policies))
    return [
        [*line, "all" if len(policies[line]) == len(POLICIES) else ", ".join(policies[line])]
        for line in sorted(policies, key=lambda line: keys.index(line[0]))
    ]


def page() -> str:
    top = rows(PretrainConfig)
    parts = [HEAD, "## Keys of pretraining\n", markdown(top)]
    for name, field in PretrainConfig.model_fields.items():
        if name == "prune":
            policies = ", ".join(f"`{policy}`" for policy in POLICIES)
            parts += [PRUNING.format(policies=policies), markdown(pruning_rows(), "policies")]
        elif isinstance(field.default, Section):
            parts += [f"### {name}\n", markdown(rows(type(field.default), f"{name}."))]
    parts += [EVALUATION, markdown(rows(EvalConfig))]
    for name, field in EvalConfig.model_fields.items():
        if isinstance(field.default, Section) and name not in PretrainConfig.model_fields:
            parts += [f"### {name}\n", markdown(rows(type(field.default), f"{name}."))]
    return "\n".join(parts)


if __name__ == "__main__":
    write_atomically(PAGE, page().encode())
