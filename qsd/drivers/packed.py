"""Compressed clusters: fetched once, unpacked beside the loop, and kept for whoever reads on.

Unpacking lets go of the interpreter's lock, so several clusters are unpacked at once on the aio engine's threads
while the loop goes on. The last clusters stay in memory (``BUDGET`` bytes), because a reader of 4 KiB would
otherwise unpack each cluster many times over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from qsd.drivers.base import Child
from qsd.drivers.gather import Gather

if TYPE_CHECKING:
    from qsd.drivers.mapped import MappedDriver

# Bytes of unpacked clusters one node keeps.
BUDGET: Final = 4 << 20

Unpack = Callable[[int, bytearray], bytes | bytearray]
Waiter = tuple[int, memoryview, Gather]


class Unpacker:
    """The unpacked clusters of one node; ``where`` is what its ``locate`` and ``unpack`` take."""

    def __init__(self, driver: MappedDriver, unpack: Unpack) -> None:
        self._driver = driver
        self._unpack = unpack
        self._cache: dict[int, bytes | bytearray] = {}
        self._size = 0
        # The unpacking under way of what is stored there, and who waits for it.
        self._waiting: dict[int, list[Waiter]] = {}

    @property
    def size(self) -> int:
        """Bytes kept."""
        return self._size

    def read(self, where: int, skip: int, view: memoryview, gather: Gather) -> None:
        """Fill ``view`` with what the cluster holds from its byte ``skip`` on, as a part of ``gather``."""
        data = self._cache.get(where)
        if data is not None:
            view[:] = memoryview(data)[skip : skip + len(view)]
            return
        gather.left += 1
        waiting = self._waiting.get(where)
        if waiting is not None:
            waiting.append((skip, view, gather))
            return
        self._waiting[where] = waiters = [(skip, view, gather)]
        child, offset, length = self._driver.locate(where)
        self._fetch(where, waiters, child, offset, length)

    def forget(self, where: int) -> None:
        """What is stored there will be something else. Reads under way get what it was, and later ones do not."""
        self._waiting.pop(where, None)
        data = self._cache.pop(where, None)
        if data is not None:
            self._size -= len(data)

    def clear(self) -> None:
        """Forget everything."""
        self._waiting.clear()
        self._cache.clear()
        self._size = 0

    def _fetch(self, where: int, waiters: list[Waiter], child: Child, offset: int, length: int) -> None:
        packed = bytearray(length)

        def fetched(error: int) -> None:
            if error:
                self._ended(where, waiters, error, None)
            else:
                self._begin(where, waiters, packed)

        self._driver.fetch(child, offset, memoryview(packed), fetched)

    def _begin(self, where: int, waiters: list[Waiter], packed: bytearray) -> None:
        result: list[bytes | bytearray] = []

        def work() -> int:
            result.append(self._unpack(where, packed))
            return 0

        def done(error: int) -> None:
            self._ended(where, waiters, -error, result[0] if result else None)

        self._driver.host.aio.call(work, done)

    def _ended(self, where: int, waiters: list[Waiter], error: int, data: bytes | bytearray | None) -> None:
        if self._waiting.get(where) is waiters:
            del self._waiting[where]
            if data is not None:
                self._keep(where, data)
        for skip, view, gather in waiters:
            if data is not None:
                view[:] = memoryview(data)[skip : skip + len(view)]
            gather.end(error)

    def _keep(self, where: int, data: bytes | bytearray) -> None:
        cache = self._cache
        cache[where] = data
        self._size += len(data)
        # At least two: a request that ends in one cluster and the next that begins there.
        while self._size > BUDGET and len(cache) > 2:
            oldest = next(iter(cache))
            self._size -= len(cache.pop(oldest))
