"""Import: files that people have -> ``SourceDomain`` -> a domain. The formats stand in ``harness/data/formats``.

Lists are taken as given: nothing is de-duplicated or filtered unless ``prepare`` (earliest of repeats, iterative 5-core).
Users with fewer than three interactions are dropped and counted. Every item of the items file is a candidate even if no
one has it; an item that occurs in lists only gets a row without text. The source id of an item or a user is its id as
text; an ``asin`` column goes to the private part.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from harness.data.domain import data_root, write_domain
from harness.data.formats import FORMATS
from harness.data.formats.common import IMAGES, PictureFolder, nearest
from harness.data.source import DataError, DomainSummary

__all__ = ["EXPORTED", "FORMATS", "import_domain"]

EXPORTED = "exported.json"
"""What an export leaves beside the files: the domain it is of. An import takes release and ``simulated`` from there."""


def import_domain(
    path: Path | str,
    name: str,
    *,
    root: Path | None = None,
    format: str = "auto",
    prepare: bool = False,
    ignore: Collection[str] = (),
    overwrite: bool = False,
) -> DomainSummary:
    """Import ``path`` as the domain ``name`` under ``root`` (default: the data root).

    ``prepare`` keeps the earliest of repeated items and applies the iterative 5-core. ``ignore`` names columns of the
    source to leave out; any other unknown column is an error, so that a misspelt ``titel`` does not lose the text.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist")
    kind = FORMATS[_recognise(path) if format == "auto" else known_format(format)]
    source = kind.read(path, ignore)
    if prepare:
        from harness.data.prepare import prepare_source

        source = prepare_source(source)
    folder = path if path.is_dir() else path.parent
    pictures: Mapping[str, bytes | Path] | None = None
    if kind.images and (folder / IMAGES).is_dir():
        pictures = PictureFolder(folder / IMAGES, source.item_ids)
        source = replace(source, dropped={**source.dropped, **pictures.refused})
    before = _exported(folder / EXPORTED)
    simulated = before.get("simulated") is True
    if source.release is None and isinstance(before.get("release"), str):
        source = replace(source, release=str(before["release"]))
    return write_domain((root or data_root()) / name, source, pictures=pictures, simulated=simulated, overwrite=overwrite)


def _exported(path: Path) -> Mapping[str, object]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not what an export leaves ({error}); mend it or take it away") from None
    return value if isinstance(value, dict) else {}


def known_format(format: str) -> str:
    if format in FORMATS:
        return format
    raise DataError(f"unknown format {format!r}{nearest(format, FORMATS)}; known are {', '.join(FORMATS)}")


def _recognise(path: Path) -> str:
    found = [name for name, kind in FORMATS.items() if kind.recognises(path)]
    if len(found) == 1:
        return found[0]
    what = f"looks like {' and '.join(found)}" if found else "holds no format that is known"
    raise DataError(f"{path} {what}; say which with --format ({', '.join(FORMATS)})")
