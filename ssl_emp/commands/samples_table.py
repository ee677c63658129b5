"""What a run's pruning/samples.parquet says of the images: their scores, and how often they were trained."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linear_eval.errors import first_line
from ssl_emp.commands.subjects import Subject, is_run, read_run_data
from ssl_emp.data.images import ImageSet
from ssl_emp.data.objects import IN_MEMORY
from ssl_emp.errors import UserError
from ssl_emp.run.report import PIXELS_KEY
from ssl_emp.safe_files import check_regular
from ssl_emp.text import resume_command

MOST_COLUMNS = 64  # of a run: seven
LONGEST_NAME = 16_384  # bytes; paths have up to 4,096, and an escaped byte takes four


def training_columns(
    subject: Subject, images: ImageSet, split: str
) -> tuple[dict[str, Tensor], Tensor | None]:
    """A run's ({"score": (N,) float32, "times_trained": (N,) int64}, (N,) bool where they are known).

    Joined by name, and only if the images come from the source that the run was trained on: another one may
    have the same names. All data sets from Python have the same source and the same names, so their pixels
    must be the same. ({}, None) where the encoder is no run, or one that kept no table.
    """
    import pyarrow as pa

    run = Path(subject.name)
    path = run / "pruning" / "samples.parquet"
    if not is_run(run) or not path.is_file():
        return {}, None
    try:
        table = read_samples(path)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        what = f"{path} cannot be read ({first_line(error)})"
        raise UserError(what, f"move it away, or: {resume_command(run)}") from error
    trained_on = read_run_data(run, {}).source
    source = subject.data.source if split == "train" else subject.data.test_source or subject.data.source
    same = source == trained_on or os.path.realpath(source) == os.path.realpath(trained_on)
    if source == IN_MEMORY:
        known_pixels = (table.schema.metadata or {}).get(PIXELS_KEY.encode())
        same = same and known_pixels == images.content["pixels"].encode()
    row_of = {name: row for row, name in enumerate(table["name"].to_pylist())} if same else {}
    rows = torch.tensor([row_of.get(name, -1) for name in images.names])
    known = rows >= 0
    columns = {}
    for name, dtype in (("score", torch.float32), ("times_trained", torch.int64)):
        values = torch.tensor(table[name].to_numpy(), dtype=dtype)
        columns[name] = torch.zeros(len(rows), dtype=dtype)
        columns[name][known] = values[rows[known]]
    return columns, known


def read_samples(path: Path, *, more: bool = False) -> Any:
    """A run's table of samples as a pyarrow.Table of name (text), score and times_trained (numbers).

    Its claims are compared with the file's size before it is read: few bytes may stand for many rows.

    Args:
        more: with the file's other columns of numbers too, in their order.

    Raises:
        UserError: no regular file.
        ValueError, pyarrow.ArrowException, OSError: not such a table.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    size = check_regular(path)
    file = pq.ParquetFile(
        path, read_dictionary=["name"], thrift_string_size_limit=1 << 26, thrift_container_size_limit=1 << 20
    )
    schema, rows = file.schema_arrow, file.metadata.num_rows
    kinds = {
        "name": lambda kind: kind.equals(pa.dictionary(pa.int32(), pa.string())) or pa.types.is_string(kind)
    }
    kinds |= {"score": pa.types.is_floating, "times_trained": pa.types.is_integer}
    for name, fits in kinds.items():
        if schema.names.count(name) != 1 or not fits(schema.field(name).type):
            raise ValueError(f"it has no column {name} of the type that a run writes")
    if rows > size:  # names differ, so that each takes a byte or more
        raise ValueError(f"{rows:,} rows in {size:,} bytes")
    numbers = [field.name for field in schema if _is_number(field.type)] if more else []
    table = file.read(columns=list(dict.fromkeys([*kinds, *numbers[:MOST_COLUMNS]])))
    names = table["name"].combine_chunks() if len(table) else table["name"]
    spelled = names.dictionary if pa.types.is_dictionary(names.type) and len(table) else names
    if len(table) != rows or any(table[name].null_count for name in ("name", "times_trained")):
        raise ValueError("it does not hold the rows that it lists")
    if rows and pc.max(pc.binary_length(spelled)).as_py() > LONGEST_NAME:
        raise ValueError(f"a name has more than {LONGEST_NAME} bytes")
    return table


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind) or pa.types.is_floating(kind)
