"""The contract of image creation: what a ``blockdev-create`` job lends the code that writes a new image.

A creator is a coroutine function ``create(host, options)``, found by the format's name in ``registry.CREATORS``;
``options`` is the format's branch of ``BlockdevCreateOptions``. It raises QmpError in the reference's words (the
job's error). A format writes into a protocol node that exists or is defined inline; a protocol makes the file.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from qsd.drivers.base import Child


class CreateHost(Protocol):
    """What the job lends."""

    def node(self, ref: Any) -> AbstractAsyncContextManager[Child]:
        """Use the node of a ``BlockdevRef`` (a name, or options of one to be opened for this) inside the scope.

        The user may read, write and resize it; everything is shared. Raises QmpError on entering.
        """

    def secret(self, name: str) -> bytes:
        """The plain bytes of the secret object ``name``. Raises QmpError."""

    def warn(self, text: str) -> None:
        """One line on the daemon's standard error."""

    async def in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run what takes long and holds no loop (key derivation, preallocation) on a thread; its result."""

    def progress(self, done: int, total: int) -> None:
        """Work done so far and in all, in whatever unit (bytes where there are any)."""


Creator = Callable[[CreateHost, Any], Awaitable[None]]
