"""The cache of L2 tables: slices of them by number, within a limit of bytes.

Two generations stand in for a list in order of use: a slice found in ``young`` costs one dictionary look-up and no
bookkeeping; one found in ``old`` moves over. When there is no room, the oldest of ``old`` goes; when ``old`` is
empty, what was young becomes old. So as long as everything in use fits, nothing is ever thrown out.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial
from typing import Final

from qsd.drivers.runs import Cold

# How many slices are looked at to find those that may go.
LOOKS: Final = 16


class Pins:
    """What has to stay in memory, each as long as all who have said so want it."""

    def __init__(self) -> None:
        self._wanted: dict[int, int] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._wanted

    def __len__(self) -> int:
        return len(self._wanted)

    def add(self, number: int) -> None:
        """One more wants it."""
        self._wanted[number] = self._wanted.get(number, 0) + 1

    def remove(self, number: int) -> None:
        """End one ``add``."""
        left = self._wanted[number] - 1
        if left:
            self._wanted[number] = left
        else:
            del self._wanted[number]


class SliceCache:
    """See the module. ``slice_bytes`` is what one slice takes, ``limit`` what all may take (at least two slices).

    ``is_pinned(number)`` says that a slice must stay: it holds what the image does not have yet.
    """

    def __init__(self, slice_bytes: int, limit: int, is_pinned: Callable[[int], bool]) -> None:
        self.slice_bytes = slice_bytes
        self.young: dict[int, array[int]] = {}
        self.old: dict[int, array[int]] = {}
        self._is_pinned = is_pinned
        self._held = Pins()
        self.set_limit(limit)

    def set_limit(self, limit: int) -> None:
        """Take another limit in bytes from the next insertion on."""
        self.limit = max(2, limit // self.slice_bytes)

    @property
    def size(self) -> int:
        """Bytes held."""
        return (len(self.young) + len(self.old)) * self.slice_bytes

    def find(self, number: int) -> array[int] | None:
        """The slice, as used now; None when it is not in memory."""
        found = self.young.get(number)
        if found is None:
            found = self.old.pop(number, None)
            if found is not None:
                self.young[number] = found
        return found

    def peek(self, number: int) -> array[int] | None:
        """The slice, without counting as use."""
        found = self.young.get(number)
        return self.old.get(number) if found is None else found

    def insert(self, number: int, table: array[int]) -> None:
        """Keep a slice that was not in memory; throw others out as the limit demands."""
        self.young[number] = table
        if len(self.young) + len(self.old) > self.limit:
            self._evict(number)

    def cold(self, key: object, number: int, start: Callable[[Callable[[int], None]], None]) -> Cold:
        """What brings a slice into memory, by ``start``."""
        return Cold(key, start, partial(self._held.add, number), partial(self._release, number))

    def _release(self, number: int) -> None:
        self._held.remove(number)
        if number not in self._held and len(self.young) + len(self.old) > self.limit:
            self._evict()

    def _must_stay(self, number: int) -> bool:
        return number in self._held or self._is_pinned(number)

    def _evict(self, keep: int = -1) -> None:
        # With all of them pinned the cache grows until some are written; looking at each of them, every time, takes
        # longer the more there are.
        for _ in range(min(LOOKS, len(self.young) + len(self.old))):
            if not self.old:
                self.young, self.old = self.old, self.young
            number = next(iter(self.old))
            table = self.old.pop(number)
            if number == keep or self._must_stay(number):
                self.young[number] = table
            elif len(self.young) + len(self.old) <= self.limit:
                return

    def drop(self, number: int) -> None:
        """Forget a slice."""
        self.young.pop(number, None)
        self.old.pop(number, None)

    def clean(self) -> None:
        """Forget what was not used since the last call (cache-clean-interval), except what is pinned."""
        kept = {number: table for number, table in self.old.items() if self._must_stay(number)}
        self.old = self.young | kept
        self.young = {}

    def clear(self) -> None:
        """Forget everything."""
        self.young = {}
        self.old = {}
