"""The values actors say to each other on the data path: I/O requests, batches, reply queues.

Rules of a request:

- offset and length are bytes; ``buffer`` is lent to whoever serves the request until it is completed;
- it is completed exactly once, by ``complete(error)``: a positive errno, or 0; that puts it on ``reply``;
- the layers a request passes may rewrite ``offset``; who made it keeps what it needs in ``tag``;
- a batch is a plain list of requests; ``submit(batch)`` never blocks and never awaits, and the list belongs to
  the callee from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum, IntFlag
from typing import Any

import attrs


class Op(IntEnum):
    """What a request asks for."""

    READ = 0
    WRITE = 1
    WRITE_ZEROES = 2
    DISCARD = 3
    FLUSH = 4
    BLOCK_STATUS = 5
    CACHE = 6


class Flag(IntFlag):
    """Modifiers of a request."""

    NONE = 0
    FUA = 1  # reach stable storage before the reply
    MAY_UNMAP = 2  # WRITE_ZEROES may deallocate
    NO_FALLBACK = 4  # WRITE_ZEROES must fail with ENOTSUP rather than write zero bytes (NBD's fast zero)
    COMPRESSED = 16  # WRITE is stored compressed: whole clusters, or up to the disk's end
    ASIDE = 32  # WRITE may take its time beside the loop: who asks has other things to do
    MAY_LEND = 8  # READ may end with a Loan or Pieces in ``result`` instead of bytes in the buffer


class BlockState(IntFlag):
    """What a BLOCK_STATUS extent is (the reference's BDRV_BLOCK_* as far as exports need them)."""

    NONE = 0
    DATA = 1  # reading takes bytes from storage
    ZERO = 2  # reads as zeroes
    ALLOCATED = 4  # defined by this layer, not by a backing file


@attrs.frozen
class Extent:
    """A run of ``length`` bytes in one state; ``depth`` is the layer that defines it (1 top, 0 nobody)."""

    length: int
    state: BlockState
    depth: int = 1


class Loan:
    """Where the bytes of a read are, instead of the bytes: a range of a file, all of it in the page cache.

    Who asked for it (``Flag.MAY_LEND``) hands the range to the kernel, which sends the pages themselves, and calls
    ``give_back`` once when it is done or has lost interest. Until the bytes have left, later writes may show in
    them. An NBD client cannot tell: its read is still under way then. A driver whose parents must see the bytes of
    one moment (a snapshot's) takes the flag out of what it passes on.
    """

    __slots__ = ("fd", "give_back", "length", "offset")

    def __init__(self, fd: int, offset: int, length: int, give_back: Callable[[], None]) -> None:
        self.fd = fd
        self.offset = offset
        self.length = length
        self.give_back = give_back

    def __len__(self) -> int:
        return self.length

    def advance(self, count: int) -> None:
        """The first ``count`` bytes have been sent."""
        self.offset += count
        self.length -= count


class Pieces:
    """The bytes of a read, in order, where they are in memory: parts of its buffer, and what lies elsewhere anyway.

    Nobody changes them again. Together they are as long as the read. Who allowed them (``Flag.MAY_LEND``) sends
    them.
    """

    __slots__ = ("views",)

    def __init__(self, views: list[memoryview]) -> None:
        self.views = views


class ReplyQueue:
    """Where finished requests of one owner come out.

    What was served on the spot is in ``ready`` when ``submit`` returns. For what ends later the owner arms the
    queue (``armed = True``); the next completion then calls ``notify`` once and disarms it.
    """

    __slots__ = ("armed", "notify", "ready")

    def __init__(self, notify: Callable[[], None]) -> None:
        self.ready: list[Request] = []
        self.notify = notify
        self.armed = False

    def put(self, request: Request) -> None:
        """Take a completed request; wake the owner when it sleeps."""
        self.ready.append(request)
        if self.armed:
            self.armed = False
            self.notify()


class Request:
    """One I/O request; see the module's rules.

    ``result`` carries the extents (a list of ``Extent``) of a completed BLOCK_STATUS, of which ``extents_wanted``
    says how many at most, or the ``Loan`` or the ``Pieces`` of a READ that allowed them.
    """

    __slots__ = (
        "buffer",
        "error",
        "extents_wanted",
        "flags",
        "length",
        "offset",
        "op",
        "reply",
        "result",
        "tag",
    )

    def __init__(
        self,
        op: int,
        offset: int,
        length: int,
        buffer: memoryview | None,
        reply: ReplyQueue,
        flags: int = 0,
        tag: Any = None,
    ) -> None:
        self.op = op
        self.offset = offset
        self.length = length
        self.buffer = buffer
        self.reply = reply
        self.flags = flags
        self.tag = tag
        self.error = 0
        self.result: Any = None
        self.extents_wanted = 1

    def complete(self, error: int = 0) -> None:
        """End the request with a positive errno, or 0, and hand it back to its owner."""
        self.error = error
        reply = self.reply
        reply.ready.append(self)
        if reply.armed:
            reply.armed = False
            reply.notify()

    def __repr__(self) -> str:
        return f"<{Op(self.op).name} {self.offset}+{self.length}{f' error {self.error}' if self.error else ''}>"


class Submitter:
    """Anything that takes a batch: a node, or a child edge. Stated here so that every room can name it."""

    __slots__ = ()

    def submit(self, batch: list[Request]) -> None:
        """Take every request of the batch; complete what can be completed now."""
        raise NotImplementedError
