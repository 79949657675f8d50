"""Millions of cluster numbers, each with one of a few words, in about twelve bytes apiece.

A dictionary takes a hundred bytes for each, and an image can claim five million tables. Here they stand in one
array, each at the first free place from its own on; which place is its own depends on a random number, so that no
image can be made to have all of them in a row. Those that come in ascending order, as tables mostly do, are kept as
they come, eight bytes apiece.

Pure. What does not fit into the room that was made goes into a dictionary.
"""

from __future__ import annotations

import secrets
from array import array
from bisect import bisect_left
from collections.abc import Iterable
from typing import Final

_CODE_BITS: Final = 4
_CODE_MASK: Final = (1 << _CODE_BITS) - 1
_WORD: Final = (1 << 64) - 1


class ClusterTable:
    """Cluster -> word, of at most 15 different words, with room for ``room`` clusters."""

    def __init__(self, room: int) -> None:
        # At most four fifths of the places are taken.
        bits = max(4, (room * 5 // 4).bit_length())
        self._mask = (1 << bits) - 1
        self._shift = 64 - bits
        self._factor = secrets.randbits(64) | 1
        # 0: free; else cluster + 1 and a code. Code 0 is left where a cluster was taken away.
        self._places = array("Q", [0]) * (1 << bits)
        self._left = room
        self._codes: dict[str, int] = {"": 0}
        self._words: list[str] = [""]
        self._more: dict[int, str] = {}
        # Ascending clusters with their word; what is said of them elsewhere counts, then the last.
        self._runs: list[tuple[array[int], str]] = []

    def get(self, cluster: int, default: str | None = None, /) -> str | None:
        """The word, or ``default``."""
        wanted = cluster + 1
        places, mask = self._places, self._mask
        at = (wanted * self._factor & _WORD) >> self._shift
        while found := places[at]:
            if found >> _CODE_BITS == wanted:
                return self._words[found & _CODE_MASK] or default
            at = at + 1 & mask
        if self._more and (word := self._more.get(cluster)) is not None:
            return word or default
        for clusters, word in self._runs:
            at = bisect_left(clusters, cluster)
            if at < len(clusters) and clusters[at] == cluster:
                return word
        return default

    def add_ascending(self, clusters: array[int], word: str) -> None:
        """Let clusters, each higher than the one before, have a word unless they were put in by themselves."""
        if clusters:
            self._runs.insert(0, (clusters, word))

    def __contains__(self, cluster: int) -> bool:
        return self.get(cluster) is not None

    def __getitem__(self, cluster: int) -> str:
        found = self.get(cluster)
        if found is None:
            raise KeyError(cluster)
        return found

    def put(self, clusters: Iterable[int], word: str) -> None:
        """Let clusters have a word, whatever they had."""
        code = self._codes.get(word)
        if code is None:
            code = self._codes[word] = len(self._words)
            self._words.append(word)
        places, mask, factor, shift = self._places, self._mask, self._factor, self._shift
        for cluster in clusters:
            wanted = cluster + 1
            at = (wanted * factor & _WORD) >> shift
            while (found := places[at]) and found >> _CODE_BITS != wanted:
                at = at + 1 & mask
            if not found and not self._left:
                self._more[cluster] = word
            else:
                self._left -= not found
                places[at] = wanted << _CODE_BITS | code

    def highest(self) -> int:
        """The highest cluster there is or was, -1 when there was none."""
        runs = (clusters[-1] for clusters, _word in self._runs)
        return max((max(self._places) >> _CODE_BITS) - 1, max(self._more, default=-1), *runs)

    def add(self, cluster: int) -> None:
        """Put a cluster in, as into a set."""
        self.put((cluster,), "in")

    def pop(self, cluster: int, default: str | None = None, /) -> str | None:
        """Forget a cluster; its word, or ``default``."""
        known = self.get(cluster)
        if known is None:
            return default
        if self._more.pop(cluster, None) is None or self._runs:
            self.put((cluster,), "")
        return known
