"""Product pictures: which are taken into a domain.

In: a folder with one file an item (``SOURCE_ID.jpg``, ``.png``, ...). Out: the encoded bytes by source id. Every picture is
decoded once: what does not decode is refused and counted. Bytes stay as they are where no side is longer than
1,024 pixels; larger pictures are re-encoded (JPEG, quality 95).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection
from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_SIDE = 1024
MAX_PIXELS = 64_000_000
MAX_BYTES = 32 << 20


def local_pictures(folder: Path, item_ids: Collection[str]) -> tuple[dict[str, bytes], int]:
    """The pictures of ``item_ids`` in ``folder`` (none if it is absent), and how many were refused."""
    wanted = set(item_ids)
    pictures: dict[str, bytes] = {}
    refused = 0
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        if file.suffix.lower() not in SUFFIXES or file.stem not in wanted or file.stem in pictures:
            continue
        data = check_picture(file.read_bytes()) if file.stat().st_size <= MAX_BYTES else None
        if data is None:
            refused += 1
        else:
            pictures[file.stem] = data
    return pictures, refused


def check_picture(data: bytes) -> bytes | None:
    """The bytes to keep, or None for a picture that does not decode (truncated, no picture, a decompression bomb)."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    return None
                picture.load()
                if max(picture.size) <= MAX_SIDE:
                    return data
                small = picture.convert("RGB")
                small.thumbnail((MAX_SIDE, MAX_SIDE))
                out = io.BytesIO()
                small.save(out, "JPEG", quality=95)
                return out.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError):
        return None
