"""The FUSE export: a mount, a session on the data plane, and how they begin and end."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import trio

from qsd.actors.core import Actor
from qsd.actors.edges import RootEdge
from qsd.block.permissions import Perm
from qsd.errors import QmpError, errno_text
from qsd.host import mount
from qsd.host.reactor import Reactor
from qsd.messages import Flag
from qsd.qapi.schema.exports import BlockExportOptionsFuse, FuseExportAllowOther
from qsd.servers.exports import Exports, Kind
from qsd.servers.fuse.operations import Operations, Rights
from qsd.servers.fuse.session import Session
from qsd.wire import fuse

log = logging.getLogger("qsd.fuse")

_TRIES = {
    FuseExportAllowOther.ON: (True,),
    FuseExportAllowOther.OFF: (False,),
    FuseExportAllowOther.AUTO: (True, False),
}


class FuseService:
    """Makes FUSE exports."""

    def __init__(self, reactor: Reactor, exports: Exports, warn: Callable[[str], None]) -> None:
        self._reactor = reactor
        self._exports = exports
        self._warn = warn
        exports.kinds["fuse"] = Kind(self._check, self._make, self._more, allows_iothreads=True)

    def _check(self, options: BlockExportOptionsFuse) -> None:
        if options.allow_inactive:
            raise QmpError("Export type does not support inactive exports")
        for entry in self._exports.entries():
            if isinstance(entry.export, FuseExport) and entry.export.mountpoint == options.mountpoint:
                raise QmpError(f"There already is a FUSE export on '{options.mountpoint}'")

    @staticmethod
    def _more(options: BlockExportOptionsFuse) -> Perm:
        return Perm.RESIZE if options.writable or options.growable else Perm.NONE

    async def _make(self, identifier: str, options: BlockExportOptionsFuse, edge: RootEdge) -> FuseExport:
        return FuseExport(identifier, options, edge, self._reactor, self._exports, self._warn)


class FuseExport(Actor):
    """One mounted file."""

    kind = "export"
    type_name = "fuse"

    def __init__(
        self,
        identifier: str,
        options: BlockExportOptionsFuse,
        edge: RootEdge,
        reactor: Reactor,
        exports: Exports,
        warn: Callable[[str], None],
    ) -> None:
        super().__init__(f"export {identifier}")
        self.id = identifier
        self.mountpoint = options.mountpoint
        # The daemon may change its working directory.
        self._path = os.path.abspath(options.mountpoint)
        self._options = options
        self._edge = edge
        self._reactor = reactor
        self._exports = exports
        self._warn = warn
        self._session: Session | None = None
        self._fd = -1
        self._is_mounted = False
        self._tasks = 0
        self._task_ended = trio.Event()

    # -- what the table of exports asks -----------------------------------------------------------------------

    def has_clients(self) -> bool:
        """Who has the file open does not keep the export."""
        return False

    def clients(self) -> Sequence[Actor]:
        """The kernel is the only one."""
        return ()

    def resized(self) -> None:
        """The node has another length: the kernel shall ask for it."""
        if self._session is not None and self._is_mounted:
            self._session.send(fuse.forget_attributes())

    async def close(self) -> None:
        """Take the mount away; return when nothing is in flight."""
        session = self._session
        if session is None:
            return
        if self._is_mounted:
            self._is_mounted = False
            await trio.to_thread.run_sync(self._unmount, abandon_on_cancel=True)
        session.stop()
        await session.wait_idle()
        while self._tasks:
            await self._task_ended.wait()
        self._session = None
        session.close()

    def statistics(self) -> dict[str, Any]:
        """The actor's facts, and the session's."""
        facts = super().statistics() | {"mountpoint": self.mountpoint, "mounted": self._is_mounted}
        session = self._session
        if session is not None:
            stats = session.stats
            facts |= {
                "requests": stats.requests,
                "rd_bytes": stats.rd_bytes,
                "wr_bytes": stats.wr_bytes,
                "in_flight": session.in_flight + self._tasks,
            }
        return facts

    # -- life -------------------------------------------------------------------------------------------------

    async def started(self) -> None:
        """Mount. Raises QmpError."""
        self._reactor.use_policy(self, self._exports.policy_of(self._options))
        await trio.to_thread.run_sync(self._check_mountpoint)
        options = self._options
        allows_other = await self._mount()
        writable = bool(options.writable)
        writethrough = bool(options.writethrough)
        rights = Rights(writable, bool(options.growable), allows_other, writethrough)
        operations = Operations(self._edge, rights, self._spawn_counted, self._tell_kernel)
        self._session = Session(
            self._fd,
            self._reactor,
            self._edge,
            operations,
            write_flags=Flag.FUA.value if writethrough else 0,
            ended=self._unmounted,
            crashed=self._crashed,
        )
        self._session.start()

    def _check_mountpoint(self) -> None:
        path = self.mountpoint
        with contextlib.suppress(OSError):
            if mount.clean_stale(path):
                self._warn(f"Took away a dead mount that a killed daemon had left on '{path}'")
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            hint = None
            if error.errno == errno.ENOTCONN:
                hint = "A FUSE mount there is dead: fusermount3 -u takes it away."
            raise QmpError(f"Failed to stat '{path}': {errno_text(error.errno or 0)}", hint=hint) from None
        if not stat.S_ISREG(mode):
            raise QmpError(f"'{path}' is not a regular file")

    async def _mount(self) -> bool:
        """Mount; whether others may enter. Raises QmpError."""
        problem = ""
        for allows_other in _TRIES[self._options.allow_other or FuseExportAllowOther.AUTO]:
            how = mount.MountOptions(
                read_only=not self._options.writable,
                root_mode=stat.S_IFREG,
                options=(
                    *("default_permissions", f"max_read={fuse.MAX_TRANSFER}"),
                    *(("allow_other",) if allows_other else ()),
                ),
            )
            try:
                self._fd = await trio.to_thread.run_sync(partial(mount.mount, self._path, how))
            except OSError as error:
                problem = error.strerror or str(error)
                continue
            self._is_mounted = True
            return allows_other
        log.info("%s: %s", self.name, problem)
        raise QmpError("Failed to mount FUSE session to export", hint=problem)

    def _unmount(self) -> None:
        # Somebody else may have unmounted it, and mounted something else there since.
        if not mount.is_connected(self._fd):
            return
        try:
            mount.unmount(self._path)
        except OSError as error:
            log.warning("%s: cannot unmount '%s': %s", self.name, self.mountpoint, error.strerror)

    def _unmounted(self) -> None:
        """From outside. The export stays until it is deleted, as the reference's does."""
        log.info("%s: '%s' was unmounted", self.name, self.mountpoint)
        self._is_mounted = False

    def _crashed(self, error: Exception) -> None:
        # Through the nursery: it is the actor's crash, which the supervisor knows what to do about.
        self.spawn(_raise, error, name="crash")

    async def stopping(self) -> None:
        """End of the daemon, or of the export."""
        self._reactor.use_policy(self, None)
        if self._session is None and self._is_mounted:
            await trio.to_thread.run_sync(self._unmount)
            os.close(self._fd)
        await self.close()
        await self._exports.stopped(self.id)

    # -- for the operations -----------------------------------------------------------------------------------

    def _tell_kernel(self, message: bytes) -> None:
        if self._session is not None:
            self._session.send(message)

    def _spawn_counted(self, function: Callable[..., Any], *args: Any, name: str) -> None:
        self._tasks += 1
        self.spawn(self._counted, function, args, name=name)

    async def _counted(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            await function(*args)
        finally:
            self._tasks -= 1
            ended, self._task_ended = self._task_ended, trio.Event()
            ended.set()


async def _raise(error: Exception) -> None:
    raise error
