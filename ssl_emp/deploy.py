"""An encoder as one file that needs nothing of ssl_emp: ONNX, or a program of torch.export (.pt2).

Both take pixels as they come out of a decoder, uint8 (B, 3, S, S), and have the division by 255 and the
normalisation inside, so that nobody can forget them or do them twice. Resizing stays outside: it starts from
images of different sizes, which no batch can hold; how it is done is in the file, see `description`. B is
free, S is fixed. What was written is loaded and compared with the encoder before it takes its name.

Letters: B images, S pixels a side, D features.
"""

import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from linear_eval.errors import first_line
from linear_eval.finetune import state_hash
from ssl_emp._version import __version__
from ssl_emp.errors import RunFailed, UserError
from ssl_emp.safe_files import replacing

FORMATS = ("onnx", "pt2")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
KEY = "ssl_emp"  # of a file's metadata
# of the largest feature. Another order of operations in float32 gave at most 1e-6, for eight networks
TOLERANCE = 1e-3
ONNX_LIMIT = 2**31 - 2**20  # bytes of weights: a protobuf message ends at 2 GiB
RESIZE = (
    "EXIF rotation, RGB, the square of the short side in the centre scaled to S x S, bicubic, antialiased: "
    "Pillow's image.resize((S, S), BICUBIC, box=SQUARE)"
)

# a process without ssl_emp, as the reader of the file will be
RELOADED = """
import sys
import torch
from safetensors.torch import load, save
torch.set_num_threads(int(sys.argv[2]))
with open(sys.argv[1], "rb") as file:
    network = torch.export.load(file).module()
assert not any(name.startswith("ssl_emp") for name in sys.modules)
with torch.inference_mode():
    found = {name: network(x).contiguous() for name, x in load(sys.stdin.buffer.read()).items()}
sys.stdout.buffer.write(save(found))
"""


class Deployed(nn.Module):
    """What a file holds: images (B, 3, S, S) uint8 -> features (B, D) float32."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.encoder(images.float() / 255)
        return features.float()


def export_encoder(
    encoder: nn.Module,
    out: Path,
    image_size: int,
    format: str,
    images: Mapping[str, Tensor] | None = None,
) -> str:
    """Write a frozen encoder on the CPU to a file, once it is known to give the same features.

    Args:
        encoder: with `mean` and `std`, images (B, 3, S, S) float in [0, 1] -> (B, D), in eval mode.
        out: the file; what is there is replaced.
        image_size: S.
        format: one of FORMATS.
        images: name -> uint8 (B, 3, S, S) to compare the features of, beside random ones.

    Returns:
        What was written and how near its features are, in a line.

    Raises:
        UserError: a package is missing, or the network cannot be exported.
        RunFailed: the file would give other features, or the disk refuses; `out` is as it was.
    """
    if format == "onnx":
        check_packages()
    network = Deployed(encoder).eval()
    batches = {**random_images(image_size), **(images or {})}
    with torch.inference_mode():
        wanted = {name: network(batch) for name, batch in batches.items()}
    check_finite(wanted)
    dim = next(iter(wanted.values())).shape[1]
    about = description(encoder, image_size, dim)
    try:
        with replacing(out, shared=True) as file:
            program = captured(network, image_size)
            if format == "onnx":
                data, opset = as_onnx(program, about)
                file.write(data)
                found, reader = run_onnx(data, batches), f"onnxruntime {version('onnxruntime')}"
            else:
                with quiet():
                    torch.export.save(program, file, extra_files={KEY: json.dumps(about)})
                file.flush()
                found, reader = run_reloaded(Path(file.name), batches), "a fresh process"
            worst = max(distance(found[name], wanted[name]) for name in batches)
            if not worst <= TOLERANCE:
                what = f"{reader} gives features that differ by {worst:.2g} of the largest one"
                other = "pt2" if format == "onnx" else "onnx"
                raise RunFailed(f"{what}; nothing was written. fix: give --format {other}, and report it")
            size = file.seek(0, io.SEEK_END)
    except OSError as error:
        what = f"cannot write {error.filename or out} ({error.strerror or first_line(error)})"
        raise RunFailed(f"{what}. fix: see to the disk and its permissions, and start it again") from error
    with_opset = f", opset {opset}" if format == "onnx" else f", torch {torch.__version__}"
    count = sum(len(batch) for batch in batches.values())
    same = "exactly" if worst == 0 else f"within {worst:.1g} of the largest"
    return (
        f"{out}: uint8 (batch, 3, {image_size}, {image_size}) -> float32 (batch, {dim}){with_opset}, "
        f"{size / 1e6:.1f} MB; {reader} gives the features of {count} images {same}"
    )


def description(encoder: nn.Module, image_size: int, dim: int) -> dict[str, Any]:
    """What a reader of the file has to know, plain values: its metadata `ssl_emp`, as JSON."""
    mean, std = (
        [round(value, 6) for value in getattr(encoder, key).flatten().tolist()] for key in ("mean", "std")
    )
    return {
        "version": __version__,
        "architecture": dict(getattr(encoder, "spec", {})),
        "encoder_sha256": state_hash(encoder),
        "input": f"images: uint8 (batch, 3, {image_size}, {image_size}), RGB",
        "output": f"features: float32 (batch, {dim})",
        "image_size": image_size,
        "features": dim,
        "before": RESIZE.replace("S x S", f"{image_size} x {image_size}").replace(
            "(S, S)", f"({image_size}, {image_size})"
        ),
        "inside": {"divided_by": 255, "mean": mean, "std": std},
    }


# ---- writing -----------------------------------------------------------------------------------------------


def captured(network: nn.Module, image_size: int) -> torch.export.ExportedProgram:
    """The network as a graph with a free batch size. Raises UserError where torch cannot follow it."""
    # two: a dimension of one would be taken for a constant
    example = (torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8),)
    batch = torch.export.Dim("batch")
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(network, example, dynamic_shapes=({0: batch},))
    except Exception as error:  # of torch's tracer, which has no common type
        name = type(getattr(network, "encoder", network)).__name__
        arch = getattr(getattr(network, "encoder", None), "spec", {}).get("arch", name)
        what = f"{arch} cannot be exported ({type(error).__name__}: {first_line(error, 120)})"
        raise UserError(what, "take a network without control flow that depends on its values") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which would go into the file
    return program


def as_onnx(program: torch.export.ExportedProgram, about: dict[str, Any]) -> tuple[bytes, int]:
    """(the bytes of an ONNX file, its opset)."""
    if sum(tensor.nbytes for tensor in program.state_dict.values()) > ONNX_LIMIT:
        raise UserError("the network has more than 2 GiB, the limit of an ONNX file", "give --format pt2")
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["features"]}
    try:
        with quiet():
            written = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    except Exception as error:  # torch, onnxscript and onnx have no common type
        what = f"ONNX has no words for this network ({type(error).__name__}: {first_line(error, 120)})"
        raise UserError(what, "give --format pt2") from error
    assert written is not None
    model = written.model_proto
    for part in (*model.graph.node, *model.graph.value_info, *(n for f in model.functions for n in f.node)):
        del part.metadata_props[:]  # paths of this machine
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, json.dumps(about)
    opset = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
    return model.SerializeToString(), opset


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters tell the progress of their passes, and warn of themselves; errors pass."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def check_packages() -> None:
    """Raise UserError where a package is missing that ONNX needs."""
    missing = []
    for name in ONNX_PACKAGES:
        try:
            import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        what = f"--format onnx needs the packages {', '.join(ONNX_PACKAGES)}; missing: {', '.join(missing)}"
        raise UserError(what, f"pip install {' '.join(missing)}, or give --format pt2")


# ---- comparing ---------------------------------------------------------------------------------------------


def random_images(image_size: int) -> dict[str, Tensor]:
    """Batches of one, two and five images of noise, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, image_size, image_size)
    return {
        f"random {count}": torch.randint(256, (count, *shape), dtype=torch.uint8, generator=generator)
        for count in (1, 2, 5)
    }


def check_finite(features: Mapping[str, Tensor]) -> None:
    bad = [name for name, rows in features.items() if not rows.isfinite().all()]
    if bad:
        fix = "use another checkpoint: this encoder has diverged"
        raise UserError(f"the features of {bad[0]} images are not finite", fix)


def distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference as a share of the largest feature; infinite where shapes differ."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    largest = max(float(wanted.abs().max()), torch.finfo(torch.float32).tiny)
    return float((found - wanted).abs().max()) / largest


def run_onnx(data: bytes, batches: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The features by onnxruntime on the CPU. Raises RunFailed where it cannot read the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        return {
            name: torch.from_numpy(session.run(["features"], {"images": batch.numpy()})[0])
            for name, batch in batches.items()
        }
    except Exception as error:  # onnxruntime's errors have no public common type
        raise RunFailed(
            f"onnxruntime cannot run it ({first_line(error)}); nothing was written. fix: give --format pt2"
        ) from error


def run_reloaded(path: Path, batches: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The features by a fresh process that has only torch. Raises RunFailed where it cannot read the file."""
    command = [sys.executable, "-c", RELOADED, str(path), str(torch.get_num_threads())]
    # clone: of tensors that share their memory safetensors takes one only
    given = save_tensors({name: batch.contiguous().clone() for name, batch in batches.items()})
    done = subprocess.run(command, input=given, capture_output=True)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit {done.returncode}"]
        what = f"a fresh process cannot read it ({lines[-1][:200]})"
        raise RunFailed(f"{what}; nothing was written. fix: give --format onnx")
    return load_tensors(done.stdout)
