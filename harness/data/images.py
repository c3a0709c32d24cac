"""Product pictures: which are taken into a domain, and in what form.

In: the bytes of a file or of a download. Out: the bytes to keep, or ``Refused`` with the reason. Every picture is decoded
once, whole. A still JPEG, PNG or WebP of at most 1,024 pixels a side keeps its bytes; what is larger, moves, or is a GIF
becomes a JPEG of quality 95 (its first frame), so that whoever trains reads three formats and no film.

``local_pictures`` takes a folder with one file an item (``SOURCE_ID.jpg``, ``.png``, ...).
"""

from __future__ import annotations

import functools
import io
import struct
import warnings
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_SIDE = 1024
MIN_SIDE = 4
"""Hosts answer with a dot of one pixel where a picture is gone."""
MAX_PIXELS = 64_000_000
MAX_BYTES = 32 << 20
QUALITY = 95
_PNG_END = b"IEND\xaeB`\x82"


class Refused(ValueError):
    """These bytes do not become a picture of a domain. ``reason`` is one word: not_a_picture, truncated, bomb, too_large, tiny."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def kept_bytes(data: bytes) -> bytes:
    """The bytes to keep: ``data`` itself, or a JPEG made of it. Raises Refused. May run in several threads at once."""
    from PIL import Image, UnidentifiedImageError

    if len(data) > MAX_BYTES:
        raise Refused("too_large", f"{len(data):,} bytes, at most {MAX_BYTES:,} are taken")
    _quiet()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise Refused("bomb", f"{picture.width} x {picture.height} pixels, at most {MAX_PIXELS:,} are decoded")
            if min(picture.size) < MIN_SIDE:
                raise Refused("tiny", f"{picture.width} x {picture.height} pixels: a placeholder")
            picture.load()
            if picture.format == "PNG" and _PNG_END not in data:
                raise Refused("truncated", "the PNG has no end")
            still = not getattr(picture, "is_animated", False)
            if still and picture.format != "GIF" and max(picture.size) <= MAX_SIDE:
                return data
            return _as_jpeg(picture)
    except Refused:
        raise
    except UnidentifiedImageError:
        raise Refused("not_a_picture", f"no JPEG, PNG, WebP or GIF; it begins with {data[:16]!r}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refused("bomb", str(error)) from None
    # What Pillow raises for damaged files; its decoders let the errors of their helpers through.
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, IndexError, KeyError, TypeError) as error:
        raise Refused("truncated", f"does not decode to its end: {error}") from None


@functools.cache
def _quiet() -> None:
    """No warnings of Pillow: our limit of pixels is the lower one. Not catch_warnings, which is not for threads."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _as_jpeg(picture: Any) -> bytes:
    """At most 1,024 pixels a side, turned as its EXIF says, on white where it is transparent."""
    from PIL import Image, ImageOps

    try:
        upright = ImageOps.exif_transpose(picture)
    except Exception:  # a broken EXIF block has many ways to fail, and the picture is good without it
        upright = picture
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    small = upright.convert("RGB")
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def check_picture(data: bytes) -> bytes | None:
    """``kept_bytes``, or None where it refuses."""
    try:
        return kept_bytes(data)
    except Refused:
        return None


def local_pictures(folder: Path, item_ids: Collection[str]) -> tuple[dict[str, bytes], dict[str, str]]:
    """The pictures of ``item_ids`` in ``folder`` (none if it is absent), and why others there were refused."""
    wanted = set(item_ids)
    pictures: dict[str, bytes] = {}
    refused: dict[str, str] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        if file.suffix.lower() not in SUFFIXES or file.stem not in wanted or file.stem in pictures:
            continue
        try:
            with open(file, "rb") as handle:
                pictures[file.stem] = kept_bytes(handle.read(MAX_BYTES + 1))
        except Refused as error:
            refused[file.stem] = error.reason
    return pictures, {item: reason for item, reason in refused.items() if item not in pictures}
