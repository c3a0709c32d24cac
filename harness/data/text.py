"""Item text: cleaning the parts of a source record and joining them into one text.

In: title, features, categories, description as the sources have them (strings or lists, HTML, entities, stray control
characters). Out: plain strings with single spaces, or None where nothing is left.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any

JOINED = ("title", "features", "categories", "description")
"""The parts that make the text, in this order (the order of the paper's family). The brand is a part but not joined."""

PARTS = ("title", "brand", "features", "categories", "description")
FALLBACKS = ("text", "keywords")
"""Columns that stand in for the text of an item that has none of the joined parts."""

DEEPEST = 8
"""Tags within tags."""

_HIDDEN = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
# A tag begins with a letter or a slash right after "<": "5 < 6 and 7 > 3" is no tag.
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
# Control characters, zero-width marks and lone surrogates (which UTF-8 cannot hold).
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028\u2029\u2060\ufeff\ud800-\udfff]")
_SPACE = re.compile(r"\s+")


def clean(value: str) -> str:
    """Entities resolved, tags and control characters out, white space folded."""
    if "&" in value:
        value = html.unescape(value)
    if "<" in value:
        value = _without_tags(value)
    if value.isprintable():  # then there is no control character, and no white space but plain spaces: most texts, many times as quick
        return " ".join(value.split()) if "  " in value else value.strip()
    return _SPACE.sub(" ", _CONTROL.sub(" ", value)).strip()


def _without_tags(value: str) -> str:
    """Until there is no tag: ``<a<b>>`` leaves ``<a >`` behind. What is nested deeper than anybody writes loses its brackets."""
    for _ in range(DEEPEST):
        stripped = _TAG.sub(" ", _HIDDEN.sub(" ", value))
        if stripped == value:
            return value
        value = stripped
    return value.replace("<", " ")


def written(value: str) -> str:
    """How a clean text must stand in a file so that ``clean`` gives it back: as it is, or with its ampersands as entities.

    >>> written("R & D"), written("write &lt; for <")
    ('R & D', 'write &amp;lt; for <')
    """
    return value if "&" not in value or clean(value) == value else value.replace("&", "&amp;")


def part(value: Any) -> str | None:
    """One part of a record as a clean string: lists are joined by commas, empty becomes None."""
    if value is None:
        return None
    if isinstance(value, str):
        return clean(value) or None
    return ", ".join(kept for entry in value if entry is not None and (kept := clean(str(entry)))) or None


def join(parts: Mapping[str, str | None]) -> str | None:
    """The text of an item from its cleaned parts; each part ends with a full stop so that it stays apart from the next.

    >>> join({"title": "Oak Stand", "categories": "Music, Stands", "brand": "Acme"})
    'Oak Stand. Music, Stands.'
    """
    found = [value for name in JOINED if (value := parts.get(name))]
    if not found:
        return next((value for name in FALLBACKS if (value := parts.get(name))), None)
    return " ".join(value if value[-1] in ".!?" else value + "." for value in found)
