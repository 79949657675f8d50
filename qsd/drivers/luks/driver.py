"""luks: the child's bytes, decrypted. The header is in front of the data, or in the child ``header``.

Reads are decrypted where they are, in the buffer the request was lent; writes are encrypted into buffers of our
own. All that comes with one batch, or is answered with one, goes through the cipher together. As in the reference a
discard does nothing, zeroes are written as encrypted zeroes, and all of the volume is data.
"""

from __future__ import annotations

import errno
import json
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import trio

from qsd.block.permissions import Perm
from qsd.drivers.base import SECTOR, Child, ChildRole, Driver, Host, Limits, Mode, limits_above
from qsd.drivers.calls import call
from qsd.drivers.filenames import tree_of
from qsd.drivers.luks.amend import amend_volume
from qsd.drivers.luks.volume import ChildArea, Volume, open_volume
from qsd.errors import QmpError, errno_text
from qsd.host.memory import AlignedPool
from qsd.messages import BlockState, Extent, Flag, Op, ReplyQueue, Request

if TYPE_CHECKING:
    from qsd.drivers.luks.sectors import Run

READ = Op.READ.value
WRITE = Op.WRITE.value
_FUA = Flag.FUA.value
_NO_FALLBACK = Flag.NO_FALLBACK.value
_DATA = BlockState.DATA | BlockState.ALLOCATED
MAX_LENGTH = (1 << 63) - 1
# Zeroes are encrypted and written in pieces of this size.
ZERO_CHUNK = 1 << 20
# Free bounce buffers a node keeps: what one busy NBD client has under way.
POOL_BYTES = 8 << 20


class _Bounce:
    """The encrypted bytes of a batch of writes; goes back to the pool when the last of them has ended."""

    __slots__ = ("item", "users")

    def __init__(self, item: tuple[memoryview, int], users: int) -> None:
        self.item = item
        self.users = users


class LuksDriver(Driver):
    """See the module."""

    name: ClassVar[str] = "luks"
    is_format: ClassVar[bool] = True
    child_specs: ClassVar[tuple[tuple[str, ChildRole], ...]] = (
        ("file", ChildRole.DATA),
        ("header", ChildRole.DATA),
    )
    can_truncate: ClassVar[bool] = True
    can_amend: ClassVar[bool] = True
    lasting: ClassVar[tuple[str, ...]] = ("key_secret",)
    fixed: ClassVar[frozenset[str]] = frozenset(lasting)

    def __init__(self, node_name: str, options: Any, mode: Mode, host: Host) -> None:
        super().__init__(node_name, options, mode, host)
        self.limits = Limits(request_alignment=SECTOR)
        self._replies = ReplyQueue(self._wake)
        self._pool = AlignedPool(POOL_BYTES)
        self._amending = trio.Lock()
        # Work for a slow cipher: one piece at a time on a thread.
        self._crypting = False
        self._waiting: deque[tuple[Callable[[], None], Callable[[], None]]] = deque()

    # -- life -------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Unlock the volume with the secret ``key-secret``."""
        if self.options.key_secret is None:
            raise QmpError("Parameter 'key-secret' is required for cipher")
        password = self.host.secret(self.options.key_secret)
        header = self.children.get("header")
        self._header_name = header.node_name if header is not None else None
        area = ChildArea(header or self._file)
        self._volume = await open_volume(area, password, is_detached=header is not None)
        self._offset = self._volume.header.payload_offset
        if self._offset > self._file.length:
            raise QmpError(f"Could not refresh total sector count: {errno_text(errno.EIO)}")
        self.refresh_length()

    @property
    def _file(self) -> Child:
        return self.children["file"]

    @property
    def volume(self) -> Volume:
        """The open volume."""
        return self._volume

    def refresh_length(self) -> None:
        """What the child has behind the payload's offset, and its limits."""
        self.limits = limits_above(self._file.limits, request_alignment=SECTOR)
        self.length = max(0, self._file.length - self._offset)

    def child_permissions(self, name: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """What the parents need, and always reading."""
        return perm | Perm.CONSISTENT_READ, shared

    async def prepare_reopen(self, options: Any, mode: Mode) -> None:
        """The header cannot move."""
        if isinstance(options.header, str) and options.header != self._header_name:
            raise QmpError("Cannot change the option 'header'")

    # -- data -------------------------------------------------------------------------------------------------

    def submit(self, batch: list[Request]) -> None:
        """Pass reads on and decrypt what comes back; encrypt writes and pass them on."""
        down: list[Request] = []
        writes: list[Request] = []
        offset, replies = self._offset, self._replies
        for request in batch:
            op = request.op
            if op == READ:
                # No loan (flags 0): the child's bytes are not the volume's.
                where, length = request.offset + offset, request.length
                down.append(Request(READ, where, length, request.buffer, replies, 0, request))
            elif op == WRITE:
                writes.append(request)
            else:
                _SERVE[op](self, request)
        replies.armed = False
        if down:
            self.in_flight += len(down)
            self._file.submit(down)
        if writes:
            self.in_flight += len(writes)
            self._write(writes)
        self._collect()

    def _wake(self) -> None:
        # The child ends its requests one by one; together they cost a fraction.
        self.host.aio.defer(self._collect)

    def _collect(self) -> None:
        """Finish what the child has finished; reads are decrypted first, all of them together."""
        replies = self._replies
        while replies.ready:
            ready, replies.ready = replies.ready, []
            reads: list[Request] = []
            runs: list[Run] = []
            ended: list[Request] = []
            for inner in ready:
                if inner.op == READ and not inner.error:
                    buffer = inner.buffer
                    assert buffer is not None
                    runs.append((inner.tag.offset // SECTOR, buffer, buffer))
                    reads.append(inner)
                else:
                    ended.append(inner)
            self._finish(ended)
            if reads:
                self._crypt(partial(self._volume.cipher.decrypt, runs), partial(self._finish, reads))
        replies.armed = True

    def _finish(self, inners: list[Request]) -> None:
        for inner in inners:
            if inner.op == READ:
                outer = inner.tag
            else:
                outer, bounce = inner.tag
                bounce.users -= 1
                if not bounce.users:
                    self._pool.give_back(bounce.item)
            self.finished()
            outer.complete(inner.error)

    def _write(self, writes: list[Request]) -> None:
        total = sum(request.length for request in writes)
        bounce = _Bounce(self._pool.take(total), len(writes))
        down: list[Request] = []
        runs: list[Run] = []
        offset, replies, used, view = self._offset, self._replies, 0, bounce.item[0]
        for request in writes:
            buffer, length = request.buffer, request.length
            assert buffer is not None
            target = view[used : used + length]
            used += length
            runs.append((request.offset // SECTOR, buffer, target))
            flags = request.flags & _FUA
            down.append(Request(WRITE, request.offset + offset, length, target, replies, flags, (request, bounce)))
        self._crypt(partial(self._volume.cipher.encrypt, runs), partial(self._file.submit, down))

    def _crypt(self, work: Callable[[], None], then: Callable[[], None]) -> None:
        """Do ``work``, here or on a thread, and ``then``."""
        if self._volume.cipher.is_fast:
            work()
            then()
            return
        self._waiting.append((work, then))
        if not self._crypting:
            self._crypt_next()

    def _crypt_next(self) -> None:
        work, then = self._waiting.popleft()
        self._crypting = True

        def run() -> int:
            work()
            return 0

        def done(_result: int) -> None:
            self._crypting = False
            if self._waiting:
                self._crypt_next()
            then()

        self.host.aio.call(run, done)

    def _forward(self, request: Request) -> None:
        if request.op != Op.FLUSH:
            request.offset += self._offset
        self._file.submit([request])

    def _discard(self, request: Request) -> None:
        request.complete(0)

    def _block_status(self, request: Request) -> None:
        request.result = [Extent(request.length, _DATA)]
        request.complete(0)

    def _write_zeroes(self, request: Request) -> None:
        if request.flags & _NO_FALLBACK:
            request.complete(errno.EOPNOTSUPP)
            return
        self.started()
        self.host.spawn(self._zero, request, name="luks write zeroes")

    async def _zero(self, request: Request) -> None:
        error = errno.EIO
        try:
            zeroes = memoryview(bytes(min(ZERO_CHUNK, request.length)))
            flags = request.flags & _FUA
            end = request.offset + request.length
            for start in range(request.offset, end, ZERO_CHUNK):
                length = min(ZERO_CHUNK, end - start)
                await call(self, Op.WRITE, start, length, zeroes[:length], flags)
            error = 0
        except OSError as failure:
            error = failure.errno or errno.EIO
        finally:
            self.finished()
            request.complete(error)

    # -- change -----------------------------------------------------------------------------------------------

    async def truncate(self, size: int, *, exact: bool = True) -> None:
        """Resize the child."""
        if size > MAX_LENGTH - self._offset:
            raise QmpError("The requested file size is too large")
        await self._file.truncate(self._offset + size, exact=exact)
        self.length = size

    async def amend(self, options: Any, *, force: bool) -> None:
        """Add or erase key slots."""
        async with self._amending:
            try:
                await amend_volume(
                    self._volume,
                    options,
                    force=force,
                    secret=self.host.secret,
                    opened_with=self.options.key_secret,
                )
            except OSError as error:
                raise QmpError(f"Could not write the LUKS header: {errno_text(error.errno or errno.EIO)}") from None

    # -- facts ------------------------------------------------------------------------------------------------

    def filename(self) -> str:
        """How the node could be opened again; the password stays a name."""
        shown = {"driver": self.name, **{name: tree_of(driver_of(child)) for name, child in self.children.items()}}
        return "json:" + json.dumps(shown | {"key-secret": self.options.key_secret})

    def format_specific(self) -> dict[str, Any] | None:
        """``ImageInfoSpecific`` of kind luks."""
        return {"type": "luks", "data": volume_info(self._volume)}

    def is_encrypted(self) -> bool:
        """It is."""
        return True

    def dirty_flag(self) -> bool | None:
        """Never dirty."""
        return False

    def allocated_size(self) -> int | None:
        """The children's together."""
        sizes = [driver_of(child).allocated_size() for child in self.children.values()]
        return None if None in sizes else sum(sizes)


def driver_of(child: Child) -> Any:
    """The driver below an edge."""
    edge: Any = child
    return edge.node.driver


def volume_info(volume: Volume) -> dict[str, Any]:
    """``QCryptoBlockInfoLUKS`` as JSON; qcow2 shows the same."""
    header, spec = volume.header, volume.spec
    info: dict[str, Any] = {
        "cipher-alg": spec.algorithm.name,
        "cipher-mode": spec.mode,
        "ivgen-alg": spec.iv_generator,
        "hash-alg": header.hash_name,
        "detached-header": not header.payload_offset,
        "payload-offset": header.payload_offset,
        "master-key-iters": header.digest_iterations,
        "uuid": header.uuid,
        "slots": [
            {"active": True, "iters": slot.iterations, "stripes": slot.stripes, "key-offset": slot.offset}
            if slot.is_active
            else {"active": False, "key-offset": slot.offset}
            for slot in header.slots
        ],
    }
    if spec.iv_generator == "essiv":
        info["ivgen-hash-alg"] = spec.iv_hash
    return info


_SERVE: dict[int, Callable[[LuksDriver, Request], None]] = {
    Op.FLUSH.value: LuksDriver._forward,
    Op.CACHE.value: LuksDriver._forward,
    Op.DISCARD.value: LuksDriver._discard,
    Op.BLOCK_STATUS.value: LuksDriver._block_status,
    Op.WRITE_ZEROES.value: LuksDriver._write_zeroes,
}
