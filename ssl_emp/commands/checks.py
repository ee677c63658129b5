"""The checks of `ssl-emp doctor`, in a process of their own; see ssl_emp/commands/doctor.py.

Each is a function without arguments that gives a `Finding`, and imports what it looks at by itself: one that
fails takes no other with it.
"""

import importlib.metadata
import io
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from linear_eval.errors import first_line
from ssl_emp._version import __version__
from ssl_emp.commands.doctor import Finding

GB = 1e9
LEAST_FREE = 2 * GB  # in the folder of runs, where checkpoints of large networks and caches of images go
LEAST_TEMPORARY = 0.5 * GB
REINSTALL = "pip install --upgrade torch torchvision"
FOR_DEVELOPERS = ("browser", "dev", "bench", "experiments", "docs")  # extras that users do not need


# ---- what is installed


def python() -> Finding:
    text = f"{platform.python_version()} on {platform.platform()}, {sys.executable}"
    if sys.maxsize < 2**32:
        return Finding(f"{text}, of 32 bits", "install a Python of 64 bits: torch has no other")
    return Finding(text)


def packages() -> Finding:
    """Versions of what ssl_emp needs, against its own metadata."""
    needed = _requirements(None)
    if needed is None:
        return Finding(f"ssl_emp {__version__} in {Path(__file__).parents[1]}, which pip did not install")
    found = {name: _version(name) for name, _ in needed}
    unmet = [
        f"{name}{wanted}"
        for name, wanted in needed
        if found[name] is None or not wanted.contains(found[name], prereleases=True)
    ]
    shown = ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())
    text = f"ssl_emp {__version__}: {shown}"
    return Finding(text, f"pip install {' '.join(map(_word, unmet))}" if unmet else None)


def extras() -> Finding:
    """What is optional, and the command for what is missing. Never a warning."""
    if _requirements(None) is None:
        return Finding("not known: pip did not install ssl_emp")
    names = importlib.metadata.metadata("ssl_emp").get_all("Provides-Extra") or []
    words = []
    for extra in names:
        if extra not in FOR_DEVELOPERS:
            missing = [
                f"{name}{wanted}" for name, wanted in _requirements(extra) or () if _version(name) is None
            ]
            words += [f"{extra} missing (pip install {' '.join(map(_word, missing))})" if missing else extra]
    return Finding(", ".join(words) or "none")


def _requirements(extra: str | None) -> list[tuple[str, Any]] | None:
    """(name, versions) of what ssl_emp needs here, or an extra of it; None where pip did not install it."""
    from packaging.requirements import Requirement

    try:
        lines = [Requirement(line) for line in importlib.metadata.requires("ssl_emp") or []]
    except importlib.metadata.PackageNotFoundError:
        return None

    def applies(line: Requirement, of: str) -> bool:
        return line.marker is None or line.marker.evaluate({"extra": of})

    return [
        (line.name, line.specifier)
        for line in lines
        if applies(line, extra or "") and (extra is None or not applies(line, ""))
    ]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _word(requirement: str) -> str:
    return f"'{requirement}'" if set(requirement) & set("<>=!~;[") else requirement


def torch_and_torchvision() -> Finding:
    try:
        import torch

        text = f"{torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA")
    except Exception as error:
        return Finding(f"torch does not load: {first_line(error)}", REINSTALL)
    try:
        import torchvision

        torchvision.ops.nms(torch.rand(1, 4), torch.rand(1), 0.5)  # of torchvision's own library
    except Exception as error:
        return Finding(f"{text}; torchvision does not fit it: {first_line(error)}", REINSTALL)
    return Finding(f"{text}, torchvision {torchvision.__version__}")


# ---- the machine


def device() -> Finding:
    import torch

    if torch.cuda.is_available():
        lines = []
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            size = f"{about.total_memory / GB:.0f} GB, sm_{about.major}{about.minor}"
            lines += [f"cuda:{number} {about.name}, {size}"]
        if problem := _does_not_compute():
            fix = "see whether other programs fill it (nvidia-smi); or install a torch that was built for it"
            return Finding(f"{'; '.join(lines)}: {problem}", fix)
        return Finding("; ".join(lines))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    text = f"cpu ({platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
    if not _has_nvidia():
        return Finding(f"{text}, no NVIDIA GPU is seen")
    if torch.version.cuda is None:
        what = f"{text}; there is an NVIDIA GPU, and this torch has no CUDA"
        return Finding(what, "install a torch with CUDA: the default one on Linux has it")
    if hidden is not None:
        return Finding(f"{text}; CUDA_VISIBLE_DEVICES={hidden} hides the GPU", "unset CUDA_VISIBLE_DEVICES")
    try:
        torch.zeros(1, device="cuda")
        why = "no reason is given"
    except Exception as error:
        why = first_line(error)
    return Finding(f"{text}; there is an NVIDIA GPU that cannot be used: {why}", "update the NVIDIA driver")


def _does_not_compute() -> str | None:
    import torch

    try:
        ones = torch.ones(64, 64, device="cuda")
        return None if (ones @ ones).sum().item() == 64**3 else "a product of matrices is wrong"
    except Exception as error:
        return f"it does not compute ({first_line(error)})"


def _has_nvidia() -> bool:
    return bool(list(Path("/dev").glob("nvidia[0-9]*"))) or Path("/proc/driver/nvidia/gpus").is_dir()


def bf16() -> Finding:
    import torch

    from ssl_emp.embedding import uses_bf16

    if torch.cuda.is_available():
        if uses_bf16(torch.device("cuda")):
            return Finding("in hardware: training and features use it on the GPU")
        return Finding("not in hardware: float32 is used on the GPU")
    known = [
        name
        for name, test in (("AVX-512", "_is_avx512_bf16_supported"), ("AMX", "_is_amx_tile_supported"))
        if getattr(torch.cpu, test, lambda: False)()
    ]
    text = f"in the CPU ({', '.join(known)})" if known else "not in the CPU"
    return Finding(f"{text}; float32 is used on CPUs")


def threads() -> Finding:
    import torch

    from ssl_emp.data.decode import cores
    from ssl_emp.run.threads import NUMBERS, Threads, quota

    number, given = torch.get_num_threads(), any(name in os.environ for name in NUMBERS)
    if given and (problem := too_many(number, cores(), quota())) is not None:
        return problem
    # what a run would say: without a number of the user's it takes as many as others leave
    line = Threads("auto", moves=False, key="OMP_NUM_THREADS=N").line
    return Finding(line or f"{number}, {cores()} core{'s' if cores() > 1 else ''}")


def too_many(number: int, cores: int, quota: int | None) -> Finding | None:
    """Threads that the user asks for against the cores that there are, and those that a container gets."""
    most = cores if quota is None else min(cores, quota)
    if number <= most:
        return None
    of = "" if quota is None else f", of which this container may use {quota} at a time"
    text = f"{number}, and {cores} cores{of}: threads wait for each other"
    return Finding(text, f"export OMP_NUM_THREADS={most}, or unset it")


def space() -> Finding:
    try:
        here = Path.cwd()
    except OSError:
        return Finding("the folder that this was started in is gone", "cd to one that is there")
    return judge_space(here, LEAST_FREE, Path(tempfile.gettempdir()), LEAST_TEMPORARY)


def judge_space(here: Path, least: float, temporary: Path, least_temporary: float) -> Finding:
    """Whether files can be written, and how much room there is, where runs and temporary files go."""
    texts, fix = [], None
    elsewhere = "work in a folder with more room, or give out=DIR and data.cache_dir=DIR"
    for folder, needed, way_out in (
        (here, least, elsewhere),
        (temporary, least_temporary, "export TMPDIR=DIR with more room: torch.compile keeps its code there"),
    ):
        try:
            with tempfile.TemporaryFile(dir=folder):
                free = shutil.disk_usage(folder).free
        except OSError as error:
            texts += [f"{folder} cannot be written to ({error.strerror or error})"]
            fix = fix or way_out
            continue
        texts += [f"{free / GB:.1f} GB free in {folder}"]
        if free < needed:
            texts[-1] += f", {needed / GB:g} GB are soon used"
            fix = fix or way_out
    return Finding("; ".join(texts), fix)


# ---- what is used when it is there


def images() -> Finding:
    import numpy as np
    import torch
    from PIL import Image

    from ssl_emp.data import decode

    stream = io.BytesIO()
    pixels = np.full((16, 16, 3), 200, np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG", quality=95)
    record = torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)
    found = np.asarray(decode.decode_jpeg(record))
    if found.shape != (3, 16, 16) or abs(found.astype(int) - 200).max() > 2:
        return Finding("a JPEG was decoded to other pixels", "pip install --upgrade --force-reinstall pillow")
    formats = ", ".join(name for name in decode.FORMATS if name != "PPM")
    heif = "" if "HEIF" in decode.FORMATS else "; HEIC needs pip install pillow-heif"
    text = f"{decode.reader_of_jpegs()} reads JPEGs; formats: {formats}{heif}"
    if decode.reader_of_jpegs() == "Pillow":  # 182 for 94 microseconds at 64 px, see decode.py
        return Finding(f"{text}. torchvision's decoder is missing, which is faster", REINSTALL)
    return Finding(text)


def faiss() -> Finding:
    import torch

    from linear_eval.knn import import_faiss

    module = import_faiss()
    if module is None:
        text = (
            "not there, or it does not load: torch searches neighbours instead, with the same numbers, slower"
        )
        gpu = "faiss-gpu" if sys.platform == "linux" and platform.machine() == "x86_64" else "faiss-cpu"
        return Finding(text, f"pip install {gpu}")
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(100, 16, generator=generator)
    index = module.IndexFlatIP(16)
    index.add(bank.numpy())
    _, found = index.search(bank.numpy(), 5)
    if not torch.equal(torch.from_numpy(found), (bank @ bank.T).topk(5).indices):
        return Finding("a search of 100 vectors found other neighbours than torch", "give knn.backend=torch")
    gpus = module.get_num_gpus() if hasattr(module, "get_num_gpus") else 0
    return Finding(f"{module.__version__}, {f'{gpus} GPU' if gpus else 'on the CPU'}, finds what torch finds")


def compiler() -> Finding:
    import torch

    from ssl_emp.device import pick_device

    target = pick_device("auto")
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=target)).sum().item()
    except Exception as error:
        need = "Triton and a C compiler" if target.type == "cuda" else "a C++ compiler"
        text = f"torch.compile does not work ({type(error).__name__}): training goes on without it, slower"
        return Finding(text, f"it needs {need}: apt-get install g++ python3-dev, or conda install gxx")
    return Finding(f"torch.compile works on {target.type}")


CHECKS: dict[str, Callable[[], Finding]] = {
    "python": python,
    "packages": packages,
    "extras": extras,
    "torch": torch_and_torchvision,
    "device": device,
    "bf16": bf16,
    "threads": threads,
    "space": space,
    "images": images,
    "faiss": faiss,
    "compile": compiler,
}


def way_out(error: Exception) -> str:
    """What to do after an error that no check has a word for."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"pip install {error.name}"
    return "see to the file that it names" if isinstance(error, OSError) else "install what it names anew"


def main(names: list[str]) -> None:
    """Run the checks of these names; a line of JSON each, alone on standard output."""
    with os.fdopen(os.dup(1), "w", encoding="ascii") as answers:
        os.dup2(2, 1)  # what libraries print is no answer
        for name in names:
            try:
                found = CHECKS[name]()
            except Exception as error:
                text = f"cannot be checked: {type(error).__name__}: {first_line(error)}"
                found = Finding(text, way_out(error))
            answers.write(json.dumps({"text": found.text, "fix": found.fix}) + "\n")
            answers.flush()
