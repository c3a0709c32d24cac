"""A configuration table of ``method.toml`` as a frozen dataclass whose every value is checked.

In: a mapping of keys to values. Out: an instance, or a ContractError that names the key, what it takes and the nearest name.
A class of settings lists its keys as fields (``int``, ``float``, ``str`` or ``bool``), choices of words in ``CHOICES``, and what
else must hold in ``check``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from harness.contract import ContractError


@dataclass(frozen=True)
class Configuration:
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {}
    """The words that a key of type ``str`` may have, where not any word will do."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_type(field.name, field.type)
        for name, known in self.CHOICES.items():
            if getattr(self, name) not in known:
                raise ContractError(f"{name} = {getattr(self, name)!r}: use one of {', '.join(map(repr, known))}")
        self.check()

    def check(self) -> None:
        """What must hold beyond types and choices; raises ContractError."""

    def _check_type(self, name: str, kind: Any) -> None:
        """TOML knows 1 and 1.0 apart, Python's True is a 1: be exact about both, and take a whole number for a float."""
        value = getattr(self, name)
        if kind == "float" and type(value) is int:
            object.__setattr__(self, name, value := float(value))
        if type(value).__name__ != kind or (kind == "float" and not math.isfinite(value)):
            raise ContractError(f"{name} = {value!r}: this key takes {'a finite number' if kind == 'float' else kind}")

    def _at_least(self, least: float, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise ContractError(f"{name} = {getattr(self, name)}: use {least} or more")

    def _above_zero(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) <= 0:
                raise ContractError(f"{name} = {getattr(self, name)}: use a number above 0")

    def _below_one(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise ContractError(f"{name} = {getattr(self, name)}: use a share from 0 up to below 1")

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def take(cls, table: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """The settings in a method's configuration, and the keys that are left, which are not of this class."""
        mine = set(cls.keys())
        return cls(**{k: v for k, v in table.items() if k in mine}), {k: v for k, v in table.items() if k not in mine}

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Self:
        """The settings, of a configuration that has no other keys. Raises ContractError with the nearest name."""
        settings, rest = cls.take(table)
        refuse(rest, cls.keys())
        return settings


def refuse(unknown: Iterable[str], known: Iterable[str]) -> None:
    """Raise ContractError for keys that nobody reads: a misspelt one would silently be a default."""
    if names := sorted(unknown):
        near = difflib.get_close_matches(names[0], list(known), 1)
        raise ContractError(f"configuration keys {names} are unknown{f'; did you mean {near[0]!r}?' if near else ''}")
