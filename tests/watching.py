"""What tests of any level use to watch a run: whose it was, and whether others had turns meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio


@contextmanager
def noted(*words: Any) -> Iterator[None]:
    """Tell which of many runs failed."""
    try:
        yield
    except BaseException as error:
        error.add_note(" ".join(map(str, words)))
        raise


class Turns:
    """Somebody else on the loop. ``count`` is how many turns it had; ``run`` is its task."""

    def __init__(self) -> None:
        self.count = 0

    async def run(self) -> None:
        """Take turns until cancelled."""
        while True:
            self.count += 1
            await trio.lowlevel.checkpoint()
