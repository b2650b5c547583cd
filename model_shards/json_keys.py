"""Typed reading of a checkpoint's JSON files, with errors that name file, key and value."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from model_shards.errors import CheckpointError


@dataclass(frozen=True)
class JsonKeys:
    """One JSON object and the place it came from. A key that is null counts as missing, except where noted.

    Every method raises CheckpointError when the key is missing and has no default, or breaks its rule.
    """

    place: str  # file, and the section within it
    values: Mapping[str, object]

    @classmethod
    def read(cls, path: Path) -> "JsonKeys":
        """Reads a file that must hold one JSON object."""
        try:
            values: object = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # invalid JSON or invalid UTF-8
            raise CheckpointError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} must hold a JSON object, got {type(values).__name__}")
        return cls(str(path), values)

    def error(self, key: str, rule: str) -> CheckpointError:
        """The error for `key` breaking `rule`; the caller raises it."""
        if key not in self.values:
            rule = rule if "missing" in rule else f"{rule}, but is missing"
            return CheckpointError(f"{self.place}: {key} {rule}")
        return CheckpointError(f"{self.place}: {key} {rule}, got {json.dumps(self.values[key])}")

    def raw(self, key: str) -> object:
        """The value, or None."""
        return self.values.get(key)

    def section(self, key: str) -> "JsonKeys | None":
        """A nested object, or None."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "must be an object")
        return JsonKeys(f"{self.place}: {key}", value)

    def count(self, key: str, default: int | None = None) -> int:
        """An integer of 0 or more."""
        value = self.raw(key)
        if value is None and default is not None:
            return default
        if not _is_count(value):
            raise self.error(key, "must be an integer of 0 or more")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        """An integer of 1 or more."""
        value = self.raw(key)
        if value is None and default is not None:
            return default
        if not _is_count(value) or value == 0:
            raise self.error(key, "must be an integer of 1 or more")
        return value

    def positive_or_none(self, key: str) -> int | None:
        """An integer of 1 or more, or null; the key itself must be there, for a default would be a guess."""
        if key not in self.values:
            raise self.error(key, "must be an integer of 1 or more, or null")
        return None if self.raw(key) is None else self.positive(key)

    def count_or_none(self, key: str) -> int | None:
        """As `positive_or_none`, with 0 read as null."""
        if key not in self.values:
            raise self.error(key, "must be an integer of 0 or more, or null")
        return self.count(key, 0) or None

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.raw(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, "must be a finite number")
        try:
            number = float(value)
        except OverflowError:  # an integer of more than 308 digits
            number = math.inf
        if not math.isfinite(number):
            raise self.error(key, "must be a finite number")
        return number

    def flag(self, key: str) -> bool:
        """A boolean, false by default."""
        value = self.raw(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        """One of `allowed`."""
        value = self.raw(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or value not in allowed:
            raise self.error(key, "must be " + " or ".join(f'"{name}"' for name in allowed))
        return value

    def token(self, key: str, default: int) -> int | None:
        """A token id; null is None, a missing key the default."""
        if key not in self.values:
            return default
        return None if self.raw(key) is None else self.count(key)

    def tokens(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A token id or a list of them; null is none, a missing key the default."""
        if key not in self.values:
            return default
        value = self.raw(key)
        ids: list[object] = value if isinstance(value, list) else [] if value is None else [value]
        checked = tuple(item for item in ids if _is_count(item))
        if len(checked) != len(ids):
            raise self.error(key, "must be a token id or a list of token ids")
        return checked


def _is_count(value: object) -> TypeGuard[int]:
    """Whether it is an integer of 0 or more; JSON's true is no integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
