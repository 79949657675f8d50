"""What a view's tree is made of. Nothing is kept: every look asks the daemon anew."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

import attrs


@attrs.frozen
class Text:
    """A file whose bytes are made when it is looked at."""

    render: Callable[[], Awaitable[bytes]]


@attrs.frozen
class Data:
    """A file that is the present contents of the block node ``node_name``, ``length`` bytes of them."""

    node_name: str
    length: int


@attrs.frozen
class Directory:
    """A directory; ``entries`` are asked for at each look."""

    entries: Callable[[], Awaitable[Mapping[str, Entry]]]


Entry: TypeAlias = Text | Data | Directory
Path: TypeAlias = tuple[str, ...]


async def find(root: Directory, path: Path) -> Entry | None:
    """The entry at ``path``; None when it is not there (any more)."""
    entry: Entry | None = root
    for name in path:
        if not isinstance(entry, Directory):
            return None
        entry = (await entry.entries()).get(name)
    return entry


def fixed(entries: Mapping[str, Entry]) -> Directory:
    """A directory whose names never change."""

    async def get() -> Mapping[str, Entry]:
        return entries

    return Directory(get)
