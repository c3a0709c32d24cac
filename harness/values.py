"""Typed values from TOML and JSON: strict models, and errors that name the file, the key and the nearest right one.

In: a path and a pydantic model. Out: a frozen value, or ``ConfigError`` whose message a user can act on.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError


class ConfigError(Exception):
    """Something a user wrote is wrong. The message names the file, the key and the mend."""


class Frozen(BaseModel):
    """Base of all values: no unknown key, no change after creation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)


def canonical_json(value: Any) -> str:
    """The one spelling of a value that is hashed: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def nearest(word: str, known: Any) -> str:
    """`` Did you mean 'x'?`` for the closest known word, or the list of known words where nothing is close."""
    known = sorted(map(str, known))
    if close := difflib.get_close_matches(str(word), known, n=1, cutoff=0.5):
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(known) or 'none'}."


def read_toml(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def build(model: type[Model], raw: Any, path: Path | str, prefix: str = "") -> Model:
    """``model`` from a plain value. Raises ConfigError with one line for every key that is wrong."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [f"{path}: {_explain(model, problem, prefix)}" for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _explain(model: type[BaseModel], problem: Any, prefix: str) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join([*filter(None, [prefix]), *location]) or "the file"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}.{nearest(location[-1], _fields_at(model, location[:-1]))}"
    if problem["type"] == "missing":
        return f"key {key!r} is missing; add it"
    return f"{key}: {problem['msg']} (got {problem['input']!r:.80})"


def _fields_at(model: type[BaseModel], location: list[str]) -> list[str]:
    """The field names of the model that a location inside another model leads to."""
    current: Any = model
    for part in location:
        fields = getattr(current, "model_fields", {})
        if part in fields:
            current = _innermost_model(fields[part].annotation)
    return list(getattr(current, "model_fields", {}))


def _innermost_model(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := _innermost_model(argument)) is not None:
            return found
    return None
