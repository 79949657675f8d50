"""The ``qsd-view`` object: its mount, as an actor on the floor of the exports, and its face in the object tree.

pyfuse3 keeps its session in module globals, so a daemon has one view at a time. It is an extra: a daemon that does
not use it never imports it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import Any

from qsd.actors.core import Actor
from qsd.actors.faces import ViewFace
from qsd.actors.supervisor import Floor
from qsd.errors import QmpError, errno_text
from qsd.qapi.schema.block import OnOffAuto
from qsd.qapi.schema.objects import QsdViewProperties
from qsd.servers.view.contents import Sources

log = logging.getLogger("qsd.view")


class Views:
    """Makes and ends the view. ``withdraw`` takes an object out of the tree when its mount has ended by itself."""

    def __init__(self, sources: Sources, withdraw: Callable[[str], None]) -> None:
        self._sources = sources
        self._withdraw = withdraw
        self._present: View | None = None
        sources.supervisor.failures[View.kind] = self._crashed

    async def make(self, options: QsdViewProperties) -> ViewFace:
        """Mount a view. Raises QmpError and leaves nothing."""
        if self._present is not None:
            raise QmpError(f"A view is mounted already: '{self._present.id}' (there is one at a time)")
        _check_mountpoint(options.mountpoint)
        view = View(options, self._sources, self._ended)
        self._present = view
        try:
            await self._sources.supervisor.start(view, Floor.EXPORTS)
        except BaseException:
            self._present = None
            raise
        return ViewFace(
            remove=lambda: self._remove(view),
            mountpoint=options.mountpoint,
            allow_other=(options.allow_other or OnOffAuto.AUTO).value,
        )

    async def _remove(self, view: View) -> None:
        await self._sources.supervisor.stop(view)

    def _ended(self, view: View) -> None:
        if self._present is view:
            self._present = None
            self._withdraw(view.id)

    def _crashed(self, actor: Actor, _error: BaseException) -> None:
        assert isinstance(actor, View)
        self._ended(actor)


def _check_mountpoint(path: str) -> None:
    try:
        is_directory = stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        text = errno_text(error.errno or 0)
        hint = (
            " (a mount that a killed daemon left behind? fusermount3 -u takes it away)"
            if error.errno == 107
            else ""
        )
        raise QmpError(f"Cannot mount a view on '{path}': {text}{hint}") from None
    if not is_directory:
        raise QmpError(f"Cannot mount a view on '{path}': Not a directory")


def _pyfuse3() -> ModuleType:
    try:
        import pyfuse3
    except ImportError:
        raise QmpError("Object type 'qsd-view' needs the extra qsd[view], which is not installed") from None
    module: ModuleType = pyfuse3
    return module


class View(Actor):
    """One mounted view."""

    kind = "view"

    def __init__(self, options: QsdViewProperties, sources: Sources, ended: Callable[[View], None]) -> None:
        super().__init__(f"view {options.id}")
        self.id = options.id
        self._options = options
        self._sources = sources
        self._ended = ended
        self._close: Callable[[], Awaitable[None]] | None = None
        self._fuse: ModuleType | None = None

    async def started(self) -> None:
        """Mount. Raises QmpError."""
        fuse = self._fuse = _pyfuse3()
        # Imported here: it stands on the extra.
        from qsd.servers.view.operations import Operations

        operations = Operations(self._sources)
        self._mount(fuse, operations)
        self._close = operations.close
        self.spawn(self._answer_kernel, fuse, name="kernel requests")

    def _mount(self, fuse: ModuleType, operations: Any) -> None:
        options = {*fuse.default_options, "fsname=qsd", "subtype=qsd-view", "ro"}
        wanted = self._options.allow_other or OnOffAuto.AUTO
        tries = {
            OnOffAuto.ON: [{"allow_other"}],
            OnOffAuto.OFF: [set[str]()],
            OnOffAuto.AUTO: [{"allow_other"}, set()] if os.getuid() == 0 else [set()],
        }[wanted]
        for more in tries:
            with contextlib.suppress(RuntimeError):
                fuse.init(operations, self._options.mountpoint, options | more)
                return
        raise QmpError(f"Cannot mount a view on '{self._options.mountpoint}'")

    async def _answer_kernel(self, fuse: ModuleType) -> None:
        await fuse.main()
        # Somebody else has unmounted it: the object goes as well.
        log.info("%s: unmounted from outside", self.name)
        self._ended(self)
        self._sources.supervisor.stop_soon(self)

    async def stopping(self) -> None:
        """Unmount, lazily when it is busy, and let go of the nodes."""
        if self._close is None or self._fuse is None:
            return
        assert self.nursery is not None
        self.nursery.cancel_scope.cancel()
        self._fuse.close(unmount=True)
        await self._close()
        self._ended(self)
