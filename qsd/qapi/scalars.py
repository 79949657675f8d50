"""How scalars are read: from JSON values (strictly typed) and from the strings of a keyval tree."""

from __future__ import annotations

from typing import Any, Protocol

from qsd.errors import QmpError
from qsd.qapi.types import BOOL, NUMBER, STR, AlternateType, Builtin, Integer, Type
from qsd.wire.literals import parse_bool, parse_integer, parse_size

_NAMES = {"string": "string", "boolean": "boolean", "number": "number"}


class Flavour(Protocol):
    """One source of input: reads scalars, and knows how paths spell a list index."""

    def scalar(self, wanted: Builtin, value: Any, path: str) -> Any: ...

    def integer(self, wanted: Integer, value: Any, path: str, name: str) -> int: ...

    def index(self, path: str, position: int) -> str: ...

    def is_absent(self, wanted: Type, value: Any) -> bool:
        """Whether an optional member that is there counts as left out."""


def invalid_type(path: str, expected: str) -> QmpError:
    return QmpError(f"Invalid parameter type for '{path}', expected: {expected}")


def _fit(wanted: Integer, value: int, name: str) -> int:
    """Check a 64 bit value against a narrower type. The reference names only the last part of the path here."""
    if not wanted.low <= value <= wanted.high:
        raise QmpError(f"Parameter '{name}' expects {wanted.c_name}")
    return value


class JsonFlavour:
    """JSON values: no conversion between types, ever."""

    def scalar(self, wanted: Builtin, value: Any, path: str) -> Any:
        if wanted is STR:
            if type(value) is str:
                return value
        elif wanted is BOOL:
            if type(value) is bool:
                return value
        elif type(value) is float or type(value) is int:
            return float(value)
        raise invalid_type(path, _NAMES[wanted.json_type])

    def integer(self, wanted: Integer, value: Any, path: str, name: str) -> int:
        if wanted.signed:
            if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
                raise invalid_type(path, "integer")
            return _fit(wanted, value, name)
        # Negative numbers are accepted as their two's complement, as the reference does.
        if type(value) is not int or not -(1 << 63) <= value < 1 << 64:
            raise QmpError(f"Parameter '{path}' expects uint64")
        return _fit(wanted, value % (1 << 64), name)

    def index(self, path: str, position: int) -> str:
        return f"{path}[{position}]"

    def is_absent(self, wanted: Type, value: Any) -> bool:
        return False


class KeyvalFlavour:
    """Strings of a keyval tree: converted by what the declaration wants."""

    def scalar(self, wanted: Builtin, value: Any, path: str) -> Any:
        text = self._leaf(value, path)
        if wanted is STR:
            return text
        if wanted is BOOL:
            flag = parse_bool(text)
            if flag is None:
                raise QmpError(f"Parameter '{path}' expects 'on' or 'off'")
            return flag
        assert wanted is NUMBER
        try:
            return float(text)
        except ValueError:
            raise invalid_type(path, "number") from None

    def integer(self, wanted: Integer, value: Any, path: str, name: str) -> int:
        text = self._leaf(value, path)
        if wanted.is_size:
            size = parse_size(text)
            if size is None or size >= 1 << 64:
                raise QmpError(f"Parameter '{path}' expects size")
            return size
        number = parse_integer(text)
        if wanted.signed:
            if number is None or not -(1 << 63) <= number < 1 << 63:
                raise QmpError(f"Parameter '{path}' expects integer")
            return _fit(wanted, number, name)
        if number is None or not -(1 << 64) < number < 1 << 64:
            raise QmpError(f"Parameter '{path}' expects integer")
        return _fit(wanted, number % (1 << 64), name)

    def index(self, path: str, position: int) -> str:
        return f"{path}.{position}"

    def is_absent(self, wanted: Type, value: Any) -> bool:
        return False

    def _leaf(self, value: Any, path: str) -> str:
        if not isinstance(value, str):
            raise QmpError(f"Parameters '{path}.*' are unexpected")
        return value


# Counts, in names of images; other numbers there are sizes and may have units.
_COUNTS = frozenset({"aio-max-batch", "cache-clean-interval", "latency-ns"})


class NameFlavour(JsonFlavour):
    """JSON in the name of an image, where everything may also be a string, as on a command line."""

    def scalar(self, wanted: Builtin, value: Any, path: str) -> Any:
        if wanted is BOOL and type(value) is not bool:
            flag = parse_bool(value) if type(value) is str else None
            if flag is None:
                raise QmpError(f"Parameter '{path}' expects 'on' or 'off'")
            return flag
        return super().scalar(wanted, value, path)

    def is_absent(self, wanted: Type, value: Any) -> bool:
        """A null is, where it does not mean something, and so is a child without any options."""
        if isinstance(wanted, AlternateType):
            return "null" not in wanted.choices and value in (None, {})
        return value is None

    def integer(self, wanted: Integer, value: Any, path: str, name: str) -> int:
        if type(value) is float and value.is_integer():
            value = int(value)
        elif type(value) is not int:
            is_count = name in _COUNTS
            read = parse_integer(value) if type(value) is str else None
            if read is None and type(value) is str and not is_count:
                read = parse_size(value)
            if read is None:
                what = "a number" if is_count else "a non-negative number below 2^64"
                raise QmpError(f"Parameter '{path}' expects {what}")
            value = read
        return super().integer(wanted, value, path, name)
