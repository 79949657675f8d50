"""What tests of any level use to watch a run: whose it was, and whether others had turns meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio


@contextmanager
def noted(*words: Any) -> Iterator[None]:
    """Tell which of many runs failed."""
    try:
        yield
    except BaseException as error:
        error.add_note(" ".join(map(str, words)))
        raise


def note_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """From now on, what ``owner.name`` is called with, by its first argument."""
    noted_calls: list[Any] = []
    function = getattr(owner, name)

    def noting(first: Any) -> Any:
        noted_calls.append(first)
        return function(first)

    monkeypatch.setattr(owner, name, noting)
    return noted_calls


class Turns:
    """Somebody else on the loop. ``count`` is how many turns it had; ``run`` is its task."""

    def __init__(self) -> None:
        self.count = 0

    async def run(self) -> None:
        """Take turns until cancelled."""
        while True:
            self.count += 1
            await trio.lowlevel.checkpoint()
