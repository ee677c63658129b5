"""`ssl-emp export ENCODER --out FILE`: an encoder as ONNX, or as a program of torch.export.

What is written and how it is checked is in ssl_emp/deploy.py, which needs torch; the words of the command and
how it ends are here.
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_emp.errors import Parser, UserError, path_argument
from ssl_emp.run.ending import ended
from ssl_emp.text import command_line, quoted

if TYPE_CHECKING:
    from torch import Tensor

USAGE = "ENCODER --out FILE.onnx|FILE.pt2 [--check IMAGES] [--overwrite]"
DESCRIPTION = """Write an encoder as one file that runs without ssl_emp.

ENCODER    a run directory, an encoder directory (model.safetensors and config.json), timm:NAME,
           torchvision:NAME

onnx       for onnxruntime and whatever else reads ONNX; needs the packages onnx, onnxscript and onnxruntime
           (the extra `export`)
pt2        a program of torch.export, for torch alone: torch.export.load(FILE).module()

Input: images, uint8 (batch, 3, S, S), RGB. Output: features, float32 (batch, D). The division by 255 and the
normalisation are inside; the resize to S pixels is not, and is described in the file's metadata `ssl_emp`.

The file is loaded and compared with the encoder on random images (and on some of IMAGES) before it is there
under its name: by onnxruntime, or in a fresh process. Exit codes: 0 done, 2 you can fix it, 3 it failed and
nothing was written, 128+n stopped by signal n, likewise.
"""
MOST_CHECKED = 16  # of IMAGES, spread over all of them


def parser() -> Parser:
    made = Parser(
        prog=command_line("export"),
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"{command_line('export')} {USAGE}",
    )
    made.add_argument("encoder", metavar="ENCODER", type=path_argument)
    made.add_argument("--out", type=path_argument, metavar="FILE", help="the file")
    made.add_argument("--format", choices=("onnx", "pt2"), help="as FILE ends, where it is left out")
    made.add_argument("--check", type=path_argument, metavar="IMAGES", help="a folder, parquet, cifar10, ...")
    made.add_argument("--image-size", type=int, metavar="S", help="pixels a side (the encoder's own)")
    made.add_argument("--overwrite", action="store_true", help="replace FILE where it is there")
    return made


def main(argv: list[str] | None = None) -> int:
    return ended(lambda: run(parser().parse_args(argv)))


def run(arguments: argparse.Namespace) -> None:
    """The whole command. Raises UserError; RunFailed where the file would give other features."""
    if not arguments.out:
        raise UserError("export has no file to write", "give --out FILE.onnx or --out FILE.pt2")
    out = Path(arguments.out)
    format = format_of(out, arguments.format)
    check_place(out, arguments.overwrite)

    from ssl_emp.deploy import check_packages

    if format == "onnx":
        check_packages()  # before the encoder is read

    import torch

    from ssl_emp.commands.embed_file import EmbedConfig, load
    from ssl_emp.commands.eval_config import check
    from ssl_emp.deploy import export_encoder
    from ssl_emp.run.streams import put
    from ssl_emp.text import printable

    given = {"data": {"image_size": arguments.image_size}}
    config = check(EmbedConfig, given, "--image-size")
    encoder, size, _ = load(arguments.encoder, config, torch.device("cpu"))
    images = {} if arguments.check is None else {"your": some_images(arguments.check, size)}
    line = export_encoder(encoder, out, size, format, images)
    put("stdout", f"{printable(line)}\n")


def format_of(out: Path, asked: str | None) -> str:
    ending = out.suffix.lower().removeprefix(".")
    if asked is None and ending not in ("onnx", "pt2"):
        raise UserError(f"{out} does not say which format it is", "give --format onnx or --format pt2")
    if asked is not None and ending in ("onnx", "pt2") and ending != asked:
        fix = f"give --out {quoted(out.with_suffix(f'.{asked}'))}, or leave --format out"
        raise UserError(f"--format {asked} does not go with the name {out}", fix)
    return asked or ending


def check_place(out: Path, overwrite: bool) -> None:
    """Raise UserError where a file cannot be written, or is there and not to be replaced."""
    if out.is_dir():
        raise UserError(f"{out} is a folder", f"give --out {quoted(out / 'encoder.onnx')}")
    if os.path.exists(out) and not out.is_file():
        raise UserError(f"{out} is no regular file, and would be replaced", "give another --out")
    if os.path.lexists(out) and not overwrite:
        raise UserError(f"{out} is there already", "give --overwrite to replace it, or another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"cannot make the folder {out.parent} ({error.strerror})"
        raise UserError(what, "give another --out") from error


def some_images(images: str, size: int) -> "Tensor":
    """Up to MOST_CHECKED of the images (B, 3, S, S) uint8, decoded as in evaluation. Raises UserError."""
    import numpy as np
    import torch

    from ssl_emp.commands.embed_file import EmbedConfig, find_images_of, one_source
    from ssl_emp.data.decode import MAX_PIXELS, pillow_limits
    from ssl_emp.data.stores import decode_into

    source = one_source(find_images_of(images, EmbedConfig()))
    count = min(MOST_CHECKED, len(source.names))
    chosen = np.linspace(0, len(source.names) - 1, count).round().astype(np.int64)
    pixels = np.empty((count, 3, size, size), np.uint8)
    with pillow_limits(MAX_PIXELS):
        failed = decode_into(pixels, source.read, chosen, MAX_PIXELS, None).failed
    if len(failed) == count:
        what = f"none of {count} images of {images} could be read ({next(iter(failed.values()))})"
        raise UserError(what, "check the files, or name others")
    return torch.from_numpy(pixels[: count - len(failed)])
