"""Memory of FUSE exports: one slot for each message, from its arrival to its reply.

A slot is laid out so that data lies on a page of its own, in both directions, with the header right before it:

             4016        4072  4080        4096
    message  | header, fuse_write_in       | a WRITE's data ...
    reply              | write's reply     |
    reply                      | header    | a READ's data ...

so one slot receives a READ and then carries its data back, in memory that is still in the CPU's cache.
"""

from __future__ import annotations

import mmap

from qsd.wire import fuse as wire

# Largest READ or WRITE: 256 pages, what the kernel allows without its administrator's help.
MAX_TRANSFER = 1 << 20
DATA = 4096
MESSAGE = DATA - wire.TRANSFER.size
READ_REPLY = DATA - wire.OUT_HEADER.size
WRITE_REPLY = DATA - wire.OUT_WRITE.size
SLOT_SIZE = DATA + MAX_TRANSFER
# Memory a slot may keep whatever happens; a transfer beyond it makes it a large one.
LARGE = 64 << 10
# Large slots that keep their memory: a megabyte each.
KEEP_LARGE = 8
# Free slots there may be.
KEEP = 256


class Slot:
    """Memory for one call. ``owner`` and ``unique`` name the READ that is served in it, so that it can be found."""

    __slots__ = ("is_abandoned", "is_large", "memory", "owner", "receive", "reply", "unique", "view", "write_reply")

    def __init__(self) -> None:
        # Private: memory of a shared mapping would survive MADV_DONTNEED.
        self.memory = mmap.mmap(-1, SLOT_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self.memory)
        # What one read of the device may fill, in the form readv wants it.
        self.receive = (self.view[MESSAGE:],)
        self.write_reply = self.view[WRITE_REPLY:DATA]
        # What is written at the end of the call that is served in it.
        self.reply = self.write_reply
        self.owner: object = None
        self.unique = 0
        # The caller has been answered already (it was interrupted); the memory is still in use.
        self.is_abandoned = False
        self.is_large = False


class Pool:
    """The slots of all exports. ``free`` is public for the hot loop, which takes and gives back small ones there.

    The last slot given back is the next one taken: it is still in the cache.
    """

    def __init__(self) -> None:
        self.free: list[Slot] = []
        self._all: set[Slot] = set()
        self._large = 0

    def make(self) -> Slot:
        """Another slot, because none is free."""
        slot = Slot()
        self._all.add(slot)
        return slot

    def give_back(self, slot: Slot, size: int = 0) -> None:
        """Take back a slot that had ``size`` bytes of data in it; of large ones only ``KEEP_LARGE`` stay large."""
        slot.unique = 0
        if size > LARGE and not slot.is_large:
            if self._large < KEEP_LARGE:
                self._large += 1
                slot.is_large = True
            else:
                slot.memory.madvise(mmap.MADV_DONTNEED, DATA + LARGE, MAX_TRANSFER - LARGE)
        self.free.append(slot)

    def forget(self, slot: Slot) -> None:
        """Leave a slot to whoever still uses its memory, for good."""
        self._large -= slot.is_large
        self._all.discard(slot)

    def trim(self) -> None:
        """An export has ended: let go of what fewer need."""
        while len(self.free) > KEEP:
            self.forget(self.free.pop())

    def find(self, owner: object, unique: int) -> Slot | None:
        """The slot in which ``owner`` serves the READ ``unique``."""
        return next((slot for slot in self._all if slot.unique == unique and slot.owner is owner), None)
