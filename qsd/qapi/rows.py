"""Long lists of an answer, whose items are made when they are written: there may be tens of thousands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import attrs

T = TypeVar("T")


@attrs.frozen(eq=False)
class Rows(Generic[T]):
    """What ``row`` makes of each item of ``source``, which must not change: JSON objects."""

    source: Sequence[T]
    row: Callable[[T], dict[str, Any]]

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.row, self.source)
