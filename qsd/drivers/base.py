"""The contract of a block driver: what a node can be.

A driver never checks what the node's funnel (``qsd.actors.node.Node.submit``) has already checked. When ``submit``
is called: the node is active and not drained; offset and length lie inside ``length`` rounded up to 512; both are
multiples of ``request_alignment``; a writing request comes only to a node that may write; FLUSH does not come
when the node ignores flushes; DISCARD comes only when the node passes discards on; MAY_UNMAP is set
only when discard=unmap allows it.

Life: ``__init__`` (no I/O) -> children are attached by the graph with ``child_permissions`` -> ``open`` -> use ->
``close``. Permission changes, reopen and activation come in pairs: prepare may await and raise, commit and abort
may neither await nor raise.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from enum import Enum
from typing import Any, ClassVar, Protocol

import attrs
import trio

from qsd.block.dirty import NamedBitmap
from qsd.block.mode import DetectZeroes as DetectZeroes
from qsd.block.mode import Mode as Mode
from qsd.block.permissions import Perm
from qsd.drivers.snapshots import InternalSnapshot
from qsd.drivers.spot import Spot
from qsd.errors import QmpError
from qsd.messages import Extent, Request
from qsd.qapi.rows import Rows

SECTOR = 512


@attrs.define
class Limits:
    """What the node's requests must keep to, and what ``query-named-block-nodes`` shows. Bytes."""

    request_alignment: int = 1  # offset and length of every request
    min_mem_alignment: int = 1  # address of a buffer: below this the driver bounces
    opt_mem_alignment: int = 4096  # address of a buffer that need not be bounced
    max_transfer: int = 0  # 0: no limit of its own
    max_iov: int = 1024
    pwrite_zeroes_alignment: int = 0
    pdiscard_alignment: int = 0
    max_hw_transfer: int = 0  # what the device takes at once; the kernel splits what is larger
    max_hw_iov: int = 0


def limits_above(below: Limits, *others: Limits, request_alignment: int = 1) -> Limits:
    """Limits of a node that passes its requests on to one with the limits ``below``, or to ``others``.

    The children deal with what is aligned otherwise; what they want of buffers, and how much the device takes at
    once, holds above as well.
    """
    wanted = attrs.evolve(below, request_alignment=request_alignment, pwrite_zeroes_alignment=0)
    for other in others:
        wanted.min_mem_alignment = max(wanted.min_mem_alignment, other.min_mem_alignment)
        wanted.opt_mem_alignment = max(wanted.opt_mem_alignment, other.opt_mem_alignment)
        wanted.max_transfer = min(filter(None, (wanted.max_transfer, other.max_transfer)), default=0)
        wanted.max_iov = min(wanted.max_iov, other.max_iov)
    return wanted


class ChildRole(str, Enum):
    """What a parent uses a child for; decides permissions and option inheritance."""

    DATA = "data"  # a format's or raw's file
    FILTERED = "filtered"  # a filter's child
    COW = "backing"  # a backing file


class Child(Protocol):
    """An edge of the graph, seen from the parent's driver."""

    @property
    def name(self) -> str:
        """The edge's name: file, backing..."""

    @property
    def length(self) -> int:
        """Bytes of the child node."""

    @property
    def limits(self) -> Limits:
        """The child node's limits."""

    @property
    def node_name(self) -> str:
        """The child node's name."""

    def submit(self, batch: list[Request]) -> None:
        """Pass requests on."""

    def spot(self) -> Spot | None:
        """The child node's ``Driver.spot``; None while requests are kept back."""

    def served(self, count: int, size: int) -> None:
        """So many reads of ``size`` bytes together have been served on the spot."""

    async def read(self, offset: int, length: int) -> bytes:
        """Slow-path read; raises OSError."""

    async def write(self, offset: int, data: bytes | bytearray | memoryview, flags: int = 0) -> None:
        """Slow-path write; raises OSError."""

    async def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        """Slow-path zeroing; raises OSError."""

    async def discard(self, offset: int, length: int) -> None:
        """Slow-path discard; raises OSError."""

    async def block_status(self, offset: int, length: int, extents: int = 1) -> list[Extent]:
        """At most ``extents`` extents from ``offset`` on; raises OSError."""

    async def flush(self) -> None:
        """Slow-path flush; raises OSError."""

    async def truncate(self, size: int, *, exact: bool = True) -> None:
        """Resize the child; raises QmpError."""

    def grow(self, size: int) -> bool:
        """Let the child be at least ``size`` bytes long, the new ones zeroes; False when that takes ``truncate``.

        The user needs the resize permission. Raises OSError (ENOSPC, EFBIG).
        """

    async def quiesce(self) -> None:
        """Return when everything that was submitted before has ended; what comes meanwhile waits a moment."""


class Aio(Protocol):
    """An engine for file I/O that must not block the loop (io_uring, or a small pool of threads).

    ``done`` is called with the result of the system call, or a negative errno. Buffers are lent until then.
    Nothing is started before ``flush``.
    """

    name: str

    def transfer(
        self,
        fd: int,
        requests: list[Request],
        places: list[tuple[memoryview, int]] | None,
        ended: Callable[[list[tuple[Request, int]]], None],
        /,
    ) -> None:
        """Start whole requests, all READ or all WRITE without FUA; ``ended`` gets requests with their results.

        ``places`` are buffers of at least the requests' lengths with their addresses, to use instead of the
        requests' own; the caller keeps them. What ends together may be told together.
        """

    def read(self, fd: int, buffer: memoryview, offset: int, done: Callable[[int], None]) -> None: ...

    def write(
        self, fd: int, buffer: memoryview, offset: int, done: Callable[[int], None], *, dsync: bool = False
    ) -> None: ...

    def fsync(self, fd: int, done: Callable[[int], None]) -> None:
        """fdatasync."""

    def punch_hole(self, fd: int, offset: int, length: int, done: Callable[[int], None]) -> None:
        """Deallocate a range of a file."""

    def call(self, function: Callable[[], int], done: Callable[[int], None]) -> None:
        """Run a blocking function off the loop; its result, or minus the errno of its OSError, goes to done."""

    def defer(self, function: Callable[[], None]) -> None:
        """Run ``function`` when the completions being told have been told; at once when none are.

        For who can do more with several completions at once than with each.
        """

    def soon(self, function: Callable[[], None]) -> None:
        """Run ``function`` on the loop in its next round, when others have had their turns. For any thread."""

    def flush(self) -> None:
        """Start what was queued: one system call for all of it."""


class Host(Protocol):
    """What the daemon lends a driver."""

    aio: Aio

    def spawn(self, function: Callable[..., Any], *args: Any, name: str) -> None:
        """Start a task in the node actor's own nursery."""

    def warn(self, text: str) -> None:
        """One line on the daemon's standard error."""

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Tell everybody about an event."""

    def secret(self, name: str) -> bytes:
        """The plain bytes of the secret object ``name``. Raises QmpError."""

    def open_child(
        self, name: str, role: ChildRole, options: Any, /, *, is_probed: bool = False
    ) -> Awaitable[Child]:
        """Open a node the image itself names (``BlockdevOptions``) and make it the child ``name``. Raises QmpError.

        ``is_probed``: its ``Driver.is_probed``.

        Only from within ``Driver.open``. It is the one gate for files the user did not name: a driver calls it when
        its options allow that, never because of an image alone. The child inherits as an inline one does, belongs
        to this node, and is in ``Driver.children`` afterwards.
        """


class BitmapStore(Protocol):
    """Where a driver keeps dirty bitmaps in its image (``Driver.bitmap_store``). The node calls it, the driver not.

    ``load`` comes first, when the node has been opened or activated. Unless the node is read-only,
    ``mark_in_use`` follows before anything is written; it also does when a node becomes writable. ``store`` comes
    before the node is closed, inactivated or made read-only, while nothing is in flight, and while the image can
    still be written; a ``flush`` follows.
    """

    def check(self, name: str, length: int, others: Iterable[NamedBitmap]) -> None:
        """Raise QmpError unless a new bitmap of ``length`` bytes can be stored along with ``others``."""

    async def load(self, size: int) -> list[NamedBitmap]:
        """What the image holds, oldest first, for a disk of ``size`` bytes. Raises QmpError."""

    async def mark_in_use(self) -> None:
        """What the image holds is out of date from now on; an interrupted run must not be taken for a clean end.

        Raises OSError.
        """

    async def store(self, bitmaps: Iterable[NamedBitmap]) -> None:
        """Make ``bitmaps`` those of the image. Raises QmpError, and then what the image holds stays in use.

        Does nothing after a ``load`` that failed.
        """

    async def remove(self, name: str) -> None:
        """Remove a bitmap from the image, if it is there. Raises OSError."""

    def facts(self) -> Rows[Any]:
        """What the image holds, for ``format_specific``."""


class Driver(ABC):
    """Base of all drivers. Sizes and offsets are bytes."""

    name: ClassVar[str]
    is_format: ClassVar[bool] = False
    is_filter: ClassVar[bool] = False
    # Options (attributes) that every reopen must name again once they are given, in the order in which they are
    # missed; and those of them that must then have the same value.
    lasting: ClassVar[tuple[str, ...]] = ()
    fixed: ClassVar[frozenset[str]] = frozenset()
    # Child edges in order: name, role. An option attribute of the same name holds the child.
    child_specs: ClassVar[tuple[tuple[str, ChildRole], ...]] = ()
    # Those of them that the driver asks the host for itself, when it has seen what is in the others.
    late_children: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, node_name: str, options: Any, mode: Mode, host: Host) -> None:
        self.node_name = node_name
        self.options = options
        self.mode = mode
        self.host = host
        self.children: dict[str, Child] = {}
        self.limits = Limits()
        self.length = 0
        # Nobody has said what the format is: the image's first bytes have. Set before ``open``.
        self.is_probed = False
        # Set by ``open`` of a driver that can keep dirty bitmaps in its image.
        self.bitmap_store: BitmapStore | None = None
        # Requests this driver has started and not completed yet, and who waits for none.
        self.in_flight = 0
        self._idle: trio.Event | None = None
        # How many amend jobs are at work; ``child_permissions`` may depend on it.
        self.amending = 0

    # -- life -------------------------------------------------------------------------------------------------

    @abstractmethod
    async def open(self) -> None:
        """Open; sets ``length`` and ``limits``. Raises QmpError in the reference's words, leaving nothing open."""

    async def close(self) -> None:
        """Let go of everything; flushing has been done by the node. Must not raise."""
        return

    # -- data -------------------------------------------------------------------------------------------------

    @abstractmethod
    def submit(self, batch: list[Request]) -> None:
        """Serve, start or forward every request. Never blocks for long, never awaits."""

    def spot(self) -> Spot | None:
        """How reads of this node are found on the spot, until the epoch ends; None: not at all."""
        return None

    def started(self) -> None:
        """Count a request that will end later."""
        self.in_flight += 1

    def finished(self, count: int = 1) -> None:
        """Count its end, or that of several."""
        self.in_flight -= count
        if not self.in_flight and self._idle is not None:
            self._idle.set()

    async def wait_idle(self) -> None:
        """Return when nothing this driver started is unfinished."""
        while self.in_flight:
            if self._idle is None or self._idle.is_set():
                self._idle = trio.Event()
            await self._idle.wait()

    def can_compress(self) -> bool:
        """Whether WRITE may be ``COMPRESSED``."""
        return False

    # -- permissions ------------------------------------------------------------------------------------------

    def child_permissions(self, name: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """What this node uses and shares on child ``name``, given what its own parents use and share together.

        The default is a filter's (and raw's): exactly the parents' sums.
        """
        return perm, shared

    async def prepare_permissions(self, perm: Perm, shared: Perm) -> None:
        """Get ready for the parents to use ``perm`` and share ``shared`` (locks, write access). Raises QmpError."""
        return

    def commit_permissions(self) -> None:
        """Keep what was prepared, release what is no longer needed."""

    def abort_permissions(self) -> None:
        """Undo what was prepared."""

    # -- change -----------------------------------------------------------------------------------------------

    async def prepare_reopen(self, options: Any, mode: Mode) -> None:
        """Get ready to live with new options, which keep to ``lasting`` and ``fixed``. Raises QmpError."""
        return

    can_reopen: ClassVar[bool] = True

    def commit_reopen(self, options: Any, mode: Mode) -> None:
        """Take the new options."""
        self.options = options
        self.mode = mode

    def abort_reopen(self) -> None:
        """Forget the prepared reopen."""

    async def become_writable(self) -> None:
        """After a reopen of a read-only node, which is held: its children can be written now. Raises QmpError."""

    async def truncate(self, size: int, *, exact: bool = True) -> None:
        """Change the length and update ``length``. Raises QmpError."""
        raise NotImplementedError

    can_truncate: ClassVar[bool] = False

    def grow(self, size: int) -> bool:
        """Be at least ``size`` bytes long at once, the new ones zeroes; False when that takes waiting.

        Updates ``length``. Raises OSError.
        """
        return size <= self.length

    async def inactivate(self) -> None:
        """Bring everything to the disk and close the image as far as its next owner needs it. Raises QmpError.

        The node may go on instead, when something else fails.
        """

    async def activate(self) -> None:
        """Look at an image anew that another owner has had meanwhile. Raises QmpError."""

    async def amend(self, options: Any, *, force: bool) -> None:
        """Change properties of the image in place (x-blockdev-amend). Raises QmpError.

        ``options`` is the driver's branch of ``BlockdevAmendOptions``. The node is writable; requests go on.
        """
        raise NotImplementedError

    can_amend: ClassVar[bool] = False
    # A driver that asks its children for what amending takes, whatever the node's own mode is.
    amends_read_only: ClassVar[bool] = False

    # -- snapshots and backing files ----------------------------------------------------------------------------

    def can_snapshot(self) -> bool:
        """Whether the image can hold internal snapshots."""
        return False

    def require_snapshots(self) -> None:
        """Raise QmpError where there can be no list of internal snapshots."""
        if not self.can_snapshot():
            raise QmpError("Failed to get a snapshot list: Operation not supported")

    def snapshots(self) -> list[InternalSnapshot]:
        """The internal snapshots, in the order of the image's list."""
        return []

    def find_snapshot(self, snapshot_id: str | None, name: str | None) -> InternalSnapshot | None:
        """The first of ``snapshots`` with that id and that name, each None for any."""
        for snapshot in self.snapshots():
            if snapshot_id in (None, snapshot.id) and name in (None, snapshot.name):
                return snapshot
        return None

    async def create_snapshot(self, name: str, now_ns: int) -> str:
        """Keep the present contents as the snapshot ``name``, taken at ``now_ns``; the snapshot's id.

        The node is drained and can write its children. Raises OSError and leaves nothing of it.
        """
        raise NotImplementedError

    async def delete_snapshot(self, snapshot_id: str) -> None:
        """Delete the snapshot with that id, which exists. The node is drained. Raises QmpError."""
        raise NotImplementedError

    async def change_backing_file(self, name: str, kind: str) -> None:
        """Name another backing file, and its format, in the image; an empty name names none. Raises OSError.

        The node may write. The children stay as they are.
        """
        raise OSError(errno.ENOTSUP, "no backing file")

    @classmethod
    def can_have_backing(cls) -> bool:
        """Whether images of this kind can have a backing file."""
        return any(role is ChildRole.COW for _name, role in cls.child_specs)

    def children_changed(self) -> None:
        """The graph has given the node another child, or none, in some place (called between awaits)."""

    def refresh_length(self) -> None:
        """Look again at how long the thing below is (after a child was resized)."""

    # -- facts ------------------------------------------------------------------------------------------------

    def allocated_size(self) -> int | None:
        """Bytes used on the host, when known (``actual-size``)."""
        return None

    def snapshot_rows(self) -> Rows[Any]:
        """``snapshots`` as JSON (``SnapshotInfo``)."""
        return Rows(self.snapshots(), InternalSnapshot.as_json)

    def filename(self) -> str:
        """The name the node is reported by (``file`` in query-named-block-nodes): plain or ``json:{...}``."""
        return ""

    def format_specific(self) -> dict[str, Any] | None:
        """``format-specific`` of ImageInfo as JSON, or None."""
        return None

    def dirty_flag(self) -> bool | None:
        """``dirty-flag`` of ImageInfo: True when the image was not closed cleanly; None without such a notion."""
        return None

    def image_facts(self) -> dict[str, Any]:
        """Further members of ImageInfo: cluster size, and what the image says about a backing file."""
        return {}

    def is_encrypted(self) -> bool:
        """Whether what is stored is encrypted."""
        return False

    def driver_statistics(self) -> dict[str, Any] | None:
        """``driver-specific`` of BlockStats as JSON, or None."""
        return None
