"""FUSE exports as actors: mounted when they start, unmounted when they end, whichever way that comes about."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import attrs
import trio
from trio_util import AsyncBool, RepeatedEvent

from qsd.actors.core import Actor
from qsd.actors.edges import RootEdge
from qsd.block.permissions import Perm
from qsd.errors import QmpError, errno_text
from qsd.host import mount
from qsd.host.reactor import Reactor
from qsd.qapi.schema.exports import BlockExportOptionsFuse, FuseExportAllowOther
from qsd.servers.exports import ExportActor, Exports, Kind
from qsd.servers.fuse.buffers import MAX_TRANSFER, Pool
from qsd.servers.fuse.file import NodeFile
from qsd.servers.fuse.session import Session

log = logging.getLogger("qsd.fuse")

T = TypeVar("T")

# Seconds the kernel has for its first message after mounting: it is sent by mount(2) itself.
INIT_SECONDS = 10.0

# What to try for each setting, in order.
_ALLOW_OTHER: dict[FuseExportAllowOther, tuple[bool, ...]] = {
    FuseExportAllowOther.OFF: (False,),
    FuseExportAllowOther.ON: (True,),
    FuseExportAllowOther.AUTO: (True, False),
}


async def _on_thread(function: Callable[..., T], *args: Any) -> T:
    # Abandoned when cancelled: a path may never resolve.
    return await trio.to_thread.run_sync(partial(function, *args), abandon_on_cancel=True)


class FuseExport(ExportActor):
    """One node as a file."""

    type_name = "fuse"

    def __init__(
        self, identifier: str, options: BlockExportOptionsFuse, edge: RootEdge, service: FuseService
    ) -> None:
        super().__init__(identifier, options, service.exports, service.reactor)
        self.edge = edge
        self.mountpoint: str = options.mountpoint
        self._service = service
        self.file = NodeFile(
            edge,
            writable=bool(options.writable),
            growable=bool(options.growable),
            writethrough=bool(options.writethrough),
        )
        self._session: Session | None = None
        self._mounted: mount.Mounted | None = None
        self._closing = trio.Lock()
        self._is_ready = AsyncBool(False)
        self._drained = RepeatedEvent()

    # -- life -------------------------------------------------------------------------------------------------

    async def started(self) -> None:
        """Mount, and wait until the kernel has made contact. Raises QmpError and leaves nothing mounted."""
        path = await self._check_mountpoint()
        self._mounted = await self._mount(path)
        self.file.allow_other = self._mounted.allow_other
        self._session = Session(
            self._mounted.fd,
            self.file,
            self._reactor,
            self._service.pool,
            spawn=self.spawn,
            ready=self._ready,
            lost=self._lost,
            idle=self._idle,
            crashed=self._crashed,
        )
        self._session.start()
        self.rule_polling()
        with trio.move_on_after(INIT_SECONDS):
            await self._is_ready.wait_value(True)
            return
        raise QmpError("Failed to mount FUSE session to export: the kernel does not answer")

    async def _check_mountpoint(self) -> str:
        try:
            path, cleaned = await _on_thread(mount.check_mountpoint, self.mountpoint)
        except OSError as error:
            text = errno_text(error.errno or errno.EIO)
            raise QmpError(f"Failed to stat '{self.mountpoint}': {text}") from None
        except ValueError:
            raise QmpError(f"'{self.mountpoint}' is not a regular file") from None
        except mount.MountError as problem:
            text = errno_text(errno.ENOTCONN)
            raise QmpError(f"Failed to stat '{self.mountpoint}': {text} ({problem})") from None
        if cleaned:
            self._service.warn(f"'{self.mountpoint}': removed the FUSE mount of a daemon that has ended")
        return path

    async def _mount(self, path: str) -> mount.Mounted:
        wish = self._options.allow_other or FuseExportAllowOther.AUTO
        problem = ""
        for allow_other in _ALLOW_OTHER[wish]:
            options = mount.MountOptions(
                read_only=not self.file.writable, allow_other=allow_other, max_read=MAX_TRANSFER
            )
            attempt = mount.Attempt(path, options)
            try:
                return await _on_thread(attempt.run)
            except mount.MountError as error:
                problem = str(error)
            except trio.Cancelled:
                attempt.give_up()
                raise
        raise QmpError(f"Failed to mount FUSE session to export: {problem}")

    def _ready(self) -> None:
        self._is_ready.value = True

    def _idle(self) -> None:
        self._drained.set()

    def _lost(self) -> None:
        """Somebody has unmounted the file. The export stays until it is deleted, as the reference's did."""
        log.info("%s: '%s' was unmounted", self.name, self.mountpoint)
        if self._mounted is not None:
            mount.lost(self._mounted)

    def _crashed(self, error: Exception) -> None:
        self.spawn(_raise, error, name="crash")

    def resized(self) -> None:
        """The node has another length: the kernel must not believe the old one."""
        if self._session is not None:
            self._session.resized()

    def clients(self) -> Sequence[Actor]:
        """The kernel is the only one, and no actor."""
        return ()

    def has_clients(self) -> bool:
        """Never: the reference deletes FUSE exports while files are open, too."""
        return False

    async def close(self) -> None:
        """Unmount; return when no call is in flight. Files that are open still answer ENOTCONN then."""
        # The daemon's end waits for a deletion that is under way: there may be calls left.
        async with self._closing:
            await self._close()

    async def _close(self) -> None:
        self._service.forget(self)
        mounted, self._mounted = self._mounted, None
        if mounted is None:
            return
        try:
            await _on_thread(mount.unmount, mounted)
        except mount.MountError as problem:
            self._service.warn(f"export '{self.id}': its mount is left behind: {problem}")
        session = self._session
        if session is not None:
            session.stop()
            while session.in_flight:
                await self._drained.wait()
        # Whoever still has the file open gets ENOTCONN from here on.
        os.close(mounted.fd)

    def statistics(self) -> dict[str, Any]:
        """The actor's facts, and the connection's."""
        facts = super().statistics() | {"mountpoint": self.mountpoint}
        if self._session is not None:
            facts |= attrs.asdict(self._session.stats) | {"in_flight": self._session.in_flight}
        return facts


async def _raise(error: Exception) -> None:
    raise error


class FuseService:
    """Makes FUSE exports, and owns what they share: the memory, and which mount points are taken."""

    def __init__(self, reactor: Reactor, exports: Exports, warn: Callable[[str], None]) -> None:
        self.reactor = reactor
        self.exports = exports
        self.warn = warn
        self.pool = Pool()
        self._mountpoints: dict[str, FuseExport] = {}
        exports.kinds["fuse"] = Kind(_check, self._make, _resizes, allows_iothreads=True)

    def forget(self, export: FuseExport) -> None:
        """The export does not want its mount point any more."""
        if self._mountpoints.get(export.mountpoint) is export:
            del self._mountpoints[export.mountpoint]
        self.pool.trim()

    async def _make(self, identifier: str, options: BlockExportOptionsFuse, edge: RootEdge) -> FuseExport:
        # By its spelling, as the reference does: mounting over another export's file is allowed.
        if options.mountpoint in self._mountpoints:
            raise QmpError(f"There already is a FUSE export on '{options.mountpoint}'")
        export = FuseExport(identifier, options, edge, self)
        self._mountpoints[options.mountpoint] = export
        return export


def _check(options: BlockExportOptionsFuse) -> None:
    if options.allow_inactive:
        raise QmpError("Export type does not support inactive exports")


def _resizes(options: BlockExportOptionsFuse) -> Perm:
    return Perm.RESIZE if options.writable or options.growable else Perm.NONE
