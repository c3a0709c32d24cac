"""The bytes of an image file -> patches, as the vision tower of Qwen2-VL reads them.

In: JPEG, PNG, ... In this order: on white where it is transparent, RGB, resized once (bicubic) to multiples of 28 x 28 pixels within
the limits of the settings, cut into 14 x 14 patches, the four of a 28 x 28 square next to each other (the tower merges them into one
token). Out: uint8, a sixth of the bytes of what goes into the tower; ``normalised`` makes that of it where the tower stands.

The released code resizes twice (first to 4..16384 squares, then to the limits); sizes are the same, pixels nearly. Instead of an error, a
picture more than 200 times as wide as high is taken as one of 200 to 1.

Legend: P patches, C = 3 x 14 x 14 numbers of a patch.
"""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from torch import Tensor

PATCH = 14
SQUARE = 2 * PATCH
"""Pixels a side of what becomes one token."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of the colours red, green, blue, from 0 to 1, as CLIP has them."""
FRAMES = 2
"""A picture is a film of two equal frames."""
MOST_OBLONG = 200


def fitted(width: int, height: int, least: int, most: int) -> tuple[int, int]:
    """Width and height in squares, nearest to the picture's shape, of ``least`` to about ``most`` squares in all."""
    long, short = max(width, height), min(width, height)
    if long > MOST_OBLONG * short:
        width, height = (MOST_OBLONG, 1) if width > height else (1, MOST_OBLONG)
    across, down = (max(1, round(side / SQUARE)) for side in (width, height))
    # in the order in which transformers computes it: where a side comes out whole, rounding decides
    if across * down > most:
        shrink = math.sqrt(height * width / (most * SQUARE**2))
        across, down = (max(1, math.floor(side / shrink / SQUARE)) for side in (width, height))
    elif across * down < least:
        grow = math.sqrt(least * SQUARE**2 / (height * width))
        across, down = (math.ceil(side * grow / SQUARE) for side in (width, height))
    return across, down


def read_picture(data: bytes, least: int, most: int) -> tuple[np.ndarray, tuple[int, int, int]] | None:
    """uint8 patches [P, C] and grid (1, rows, columns) of patches; None: nothing that can be decoded."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
                picture = Image.alpha_composite(white, picture)
            across, down = fitted(*picture.size, least, most)
            size = (across * SQUARE, down * SQUARE)
            pixels_HWC = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    # rows of squares, patch rows in a square, pixel rows; the same across; colours
    parts = pixels_HWC.reshape(down, 2, PATCH, across, 2, PATCH, 3)
    return parts.transpose(0, 3, 1, 4, 6, 2, 5).reshape(4 * down * across, -1), (1, 2 * down, 2 * across)


def picture_grid(data: bytes, least: int, most: int) -> tuple[int, int, int] | None:
    """The grid alone, from the head of the file: what ``read_picture`` gives for a picture that can be decoded to its end."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            across, down = fitted(*picture.size, least, most)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return 1, 2 * down, 2 * across


def normalised(patches_PC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[P, 3 x 2 x 14 x 14]: colours, frames, pixels; each colour less its mean over its deviation."""
    mean, deviation = (torch.tensor(three, device=patches_PC.device)[:, None, None] for three in (MEAN, DEVIATION))
    x_PCHW = (patches_PC.view(-1, 3, PATCH, PATCH).float() / 255 - mean) / deviation
    return x_PCHW.to(dtype)[:, :, None].expand(-1, -1, FRAMES, -1, -1).flatten(1)
