"""Small pictures of many samples as one JPEG: a page then decodes one image, not hundreds."""

import base64
import io
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

LARGEST = 96  # pixels a side of a picture
BLOCK = 16  # JPEG codes squares of 8 pixels, of halved colour 16: a picture must not share one
COLUMNS = 20
QUALITY = 84


def sprite(images: Tensor) -> dict[str, Any]:
    """(n, 3, S, S) uint8 -> {"jpeg": base64, "side": pixels of a picture, "tile": from one to the next,
    "columns": pictures in a row of the JPEG}.

    A picture smaller than its tile is continued by its last row and column, so that none looks into the next.
    """
    count, side = len(images), min(images.shape[-1], LARGEST)
    if side < images.shape[-1]:
        small = F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True)
        images = small.round().clamp(0, 255).byte()
    tile = -(-side // BLOCK) * BLOCK
    padded = F.pad(images.float(), (0, tile - side, 0, tile - side), mode="replicate").byte().numpy()
    columns = min(COLUMNS, max(count, 1))
    rows = -(-count // columns)
    sheet = np.zeros((rows, columns, 3, tile, tile), np.uint8)
    sheet.reshape(rows * columns, 3, tile, tile)[:count] = padded
    pixels = sheet.transpose(0, 3, 1, 4, 2).reshape(rows * tile, columns * tile, 3)
    stream = io.BytesIO()
    few = side <= 48  # of so few pixels each is seen
    quality, halved = (92, 0) if few else (QUALITY, 2)
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality, subsampling=halved, optimize=True)
    jpeg = base64.b64encode(stream.getvalue()).decode()
    return {"jpeg": jpeg, "side": side, "tile": tile, "columns": columns}
