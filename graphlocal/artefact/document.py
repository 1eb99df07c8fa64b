"""Reading JSON that nobody vouches for: strict parsing, and a cursor that knows its place and checks every type."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, NoReturn

from graphlocal.errors import FileFormatError, nearest

LARGEST = 2**63 - 1
"""The largest whole number in a file, torch's largest size."""
REMEDY = "write it anew with local.save(path)"


def to_bytes(document: Any) -> bytes:
    """Compact JSON; the same for equal documents. Raises ValueError for a float that is not a number."""
    return json.dumps(document, allow_nan=False, ensure_ascii=True, separators=(",", ":")).encode()


def parse(data: bytes, member: str) -> Doc:
    """The document in a member. Raises FileFormatError for what JSON does not allow, and for a key given twice."""
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_without_repetition
        )
    except RecursionError:
        raise FileFormatError(f"{member} is nested too deep", remedy=REMEDY) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{member} is not valid JSON", why=str(error)[:200], remedy=REMEDY) from None
    return Doc(value, member)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


class Doc:
    """A value of a document and its place there, such as `module.json: tensors[3].shape`."""

    def __init__(self, value: Any, place: str) -> None:
        self.value, self.place = value, place

    def error(self, message: str) -> FileFormatError:
        return FileFormatError(f"the file can't be read: {message}", where=self.place, remedy=REMEDY)

    def fields(self, *names: str) -> list[Doc]:
        """The values of exactly these fields."""
        found = self._of(dict, "fields in braces")
        for name in found:
            if name not in names:
                raise self.error(f"unknown field {shown(name)} ({nearest(name, names)})")
        missing = [name for name in names if name not in found]
        if missing:
            raise self.error(f"the field {missing[0]!r} is missing")
        return [Doc(found[name], f"{self.place}{'.' if '.json: ' in self.place else ': '}{name}") for name in names]

    def items(self) -> Iterator[tuple[str, Doc]]:
        """Names and values of a dictionary with any keys."""
        yield from (
            (name, Doc(value, f"{self.place}[{name!r:.60}]")) for name, value in self._of(dict, "braces").items()
        )

    def array(self, limit: int = LARGEST) -> list[Doc]:
        found = self._of(list, "a list")
        if len(found) > limit:
            raise self.error(f"a list of {len(found)}, of which {limit} are allowed")
        return [Doc(value, f"{self.place}[{i}]") for i, value in enumerate(found)]

    def text(self) -> str:
        found: str = self._of(str, "a string")
        return found

    def flag(self) -> bool:
        found: bool = self._of(bool, "true or false")
        return found

    def number(self, low: int = 0, high: int = LARGEST) -> int:
        found: int = self._of(int, "a whole number")
        if not low <= found <= high:
            raise self.error(f"expected a number from {low} to {high}, found {shown(found)}")
        return found

    def one_of(self, known: Any) -> str:
        name = self.text()
        if name not in known:
            raise self.error(f"{shown(name)} is unknown ({nearest(name, known)})")
        return name

    def _of(self, kind: type, words: str) -> Any:
        if type(self.value) is not kind:
            raise self.error(f"expected {words}, found {shown(self.value)}")
        return self.value


def shown(value: Any) -> str:
    """The value as Python prints it, cut short."""
    if isinstance(value, (dict, list)):
        return f"a {'list' if isinstance(value, list) else 'dictionary'} of {len(value)}"
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
