"""10,000 silhouettes of ten animals, 28x28 grey, as parquet: data unlike the others, to judge encoders on.

    pip download --no-deps animal-mnist && unzip animal_mnist-*.whl -d animals        # MIT, 2.6 MB
    python -m experiments.animal_shapes animals data/animals

The package holds two pickled arrays. Their bytes are taken without running what a pickle could run. One image
in five of each class is test, by the order of a fixed seed.
"""

import argparse
import gzip
import io
import pickletools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NAMES = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
FOLDER = Path("animal_mnist") / "data" / "Animal_MNIST"


def raw_array(file: Path) -> bytes:
    """The longest run of bytes in a gzipped pickle, which is its array."""
    pickled = gzip.decompress(file.read_bytes())
    found = (argument for _, argument, _ in pickletools.genops(pickled) if isinstance(argument, bytes))
    return max(found, key=len)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser()
    options.add_argument("package", type=Path, help="the folder with animal_mnist in it")
    options.add_argument("out", type=Path)
    args = options.parse_args(argv)
    pixels = np.frombuffer(raw_array(args.package / FOLDER / "animal_data_version_3.gz"), np.uint8)
    labels = np.frombuffer(raw_array(args.package / FOLDER / "animal_label_version_3.gz"), np.int64)
    pixels = pixels.reshape(len(labels), 28, 28)
    rank = np.empty(len(labels), int)  # place within the class, in a fixed random order
    for label in range(len(NAMES)):
        rows = np.random.default_rng(label).permutation(np.flatnonzero(labels == label))
        rank[rows] = np.arange(len(rows))
    args.out.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", np.flatnonzero(rank % 5 > 0)), ("test", np.flatnonzero(rank % 5 == 0))):
        images = [{"bytes": png(pixels[row]), "path": f"{row:05}.png"} for row in rows]
        pq.write_table(pa.table({"image": images, "label": labels[rows]}), args.out / f"{split}.parquet")
        print(f"{split}: {len(rows):,} images, {len(np.unique(labels[rows]))} classes")


if __name__ == "__main__":
    main()
