"""`ssl-emp embed ENCODER IMAGES --out FILE.parquet`: a vector for every image.

What the command does is in ssl_emp/commands/embed_file.py, which needs torch; its words and how it ends are
here.
"""

import argparse
import os

from ssl_emp.errors import Parser, RunFailed, UserError, path_argument, path_word
from ssl_emp.run.interrupts import Interrupts, Stopped
from ssl_emp.run.streams import prepare_streams, put
from ssl_emp.text import command_line, printable

DESCRIPTION = """Write a parquet row for every image: its path and its vector, by a frozen encoder.

ENCODER    a run directory, an encoder directory (model.safetensors and config.json), timm:NAME,
           torchvision:NAME
IMAGES     a folder of images (any depth), an image, parquet (a file, a glob, a folder), a name such as
           cifar10: with labels or without
key=value  data.image_size (pixels a side; the encoder's own), data.kind, data.image_column, data.max_pixels,
           data.download_dir as for pretraining; split (train or test of what has both; all), precision
           (float32 or bfloat16; auto: bfloat16 on GPUs that have it)

Columns: path (below IMAGES, or FILE.parquet#ROW), vector; with --features=patches also patches, the last map
before the pooling, P places of C numbers row by row; with --features=stages also stage_1, stage_2, ..., the
map that each stage (of a transformer: block) ends with, averaged over its places. Their shapes, the encoder,
its sha256, the preprocessing and the images that could not be read are in the file's metadata `ssl_emp`.

Rows are written in chunks to FILE.parquet.parts/, and FILE.parquet is there when all of it is. What was
interrupted goes on with the same command after the last whole chunk, and gives the same bytes. Exit codes: 0
done (an image that cannot be read is left out and told), 2 you can fix it, 3 it failed (a full disk, another
process was lost) and whole chunks are kept, 128+n stopped by signal n, likewise.

    torchrun --nproc-per-node 8 -m ssl_emp embed ...

Several processes share the chunks, each on a GPU of its own where there are GPUs; the rows are those of one.
"""
AGAIN = "; whole chunks are kept. fix: see what it wrote, and start the same command again"


def usage() -> str:
    words = "ENCODER IMAGES --out FILE.parquet [--features ...] [key=value ...]"
    return f"{command_line('embed')} {words}"


def parser() -> Parser:
    made = Parser(
        prog=command_line("embed"),
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=usage(),
    )
    made.add_argument("words", nargs="*", metavar="ENCODER IMAGES | key=value")
    made.add_argument("--out", type=path_argument, metavar="FILE", help="the parquet file")
    features = ("pooled", "patches", "stages")
    made.add_argument("--features", choices=features, default="pooled", help="columns beside vector")
    made.add_argument("--batch-size", type=int, default=256, metavar="N", help="images a forward pass (256)")
    made.add_argument("--device", default="auto", help="auto: a GPU if there is one; cpu, cuda, cuda:1")
    made.add_argument(
        "--overwrite", action="store_true", help="replace another FILE, or another unfinished one"
    )
    return made


def main(argv: list[str] | None = None) -> int:
    prepare_streams()
    try:
        arguments = parser().parse_intermixed_args(argv)
        # an image, or a folder, whose name has an equals sign
        given = [word for word in arguments.words if "=" in word and not os.path.exists(word)]
        names = [path_word(word) for word in arguments.words if word not in given]
        if len(names) != 2:
            raise UserError(f"embed takes one ENCODER and one IMAGES, {len(names)} words are named", usage())
        if not arguments.out:
            raise UserError("embed has no file to write", "give --out FILE.parquet")
    except UserError as error:
        put("stderr", f"error: {printable(str(error))}\n")
        return 2
    # checkpoints from model hubs are read without pickle
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    encoder, images = names
    return run(arguments, encoder, images, given)


def run(arguments: argparse.Namespace, encoder: str, images: str, given: list[str]) -> int:
    """The command, and how it ends: the exit code."""
    from linear_eval.errors import EvalError
    from ssl_emp.commands.embed_file import embed
    from ssl_emp.run.ranks import (
        ALONE,
        TIMEOUT_SECONDS,
        LostRank,
        NoPlace,
        connect,
        end_abruptly,
        end_with_line,
        leave_ranks,
    )

    ranks = ALONE
    try:
        with Interrupts():
            if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
                ranks = connect(TIMEOUT_SECONDS, advice=AGAIN)
            embed(arguments, encoder, images, given, ranks)
            leave_ranks(ranks)
        return 0
    except NoPlace as error:
        return end_with_line(str(error), 2, ranks, True)
    except (UserError, EvalError) as error:
        return end_with_line(str(error), 2, ranks)
    except RunFailed as error:
        return end_with_line(str(error), 3, ranks, ranks.is_first)
    except LostRank as error:
        return end_with_line(str(error), error.code, ranks, error.speaks, error.lost)
    except KeyboardInterrupt as stopped:
        code = 128 + stopped.number if isinstance(stopped, Stopped) else 130
        if ranks.is_first:
            put("stderr", "stopped; whole chunks are kept, and the same command goes on\n")
        end_abruptly(ranks, code)
        return code
    except Exception as error:
        ranks.report_failure(f"{type(error).__name__}: {error}", 1)
        raise  # a bug: the traceback is what helps
