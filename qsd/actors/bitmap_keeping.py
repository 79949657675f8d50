"""Dirty bitmaps that a node keeps in its image: loaded with the node, stored when it stops being written.

Three moments end the writing: closing the node, inactivating it, making it read-only. Opening, activating and
making it writable begin it. All but closing and opening are parts of changes of the graph, by the actions here.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

import attrs

from qsd.actors.transaction import Action
from qsd.block.dirty import Bar
from qsd.errors import FAILURES, QmpError, errno_text
from qsd.host.shield import shield

if TYPE_CHECKING:
    from qsd.actors.node import Node
    from qsd.drivers.base import BitmapStore

log = logging.getLogger("qsd.node")


async def load(node: Node) -> None:
    """Take in what the image holds; from here on it may be written. Raises QmpError, and takes in nothing."""
    store = node.driver.bitmap_store
    if store is None or not node.active:
        return
    found = await store.load(node.length)
    for bitmap in found:
        bitmap.is_read_only = node.mode.read_only
    node.bitmaps.adopt(found)
    if not node.mode.read_only:
        try:
            await _mark_in_use(store)
        except BaseException:
            node.bitmaps.disown()
            raise


async def _mark_in_use(store: BitmapStore) -> None:
    try:
        await store.mark_in_use()
    except OSError as error:
        raise QmpError(f"Can't update bitmap directory: {errno_text(error.errno or 0)}") from None


def must_stop(node: Node, *, active: bool, read_only: bool) -> bool:
    """Whether its bitmaps are to be seen to before the node is ``active`` and ``read_only`` like that."""
    return (node.bitmaps.has_adopted and node.active and not active) or (is_storing(node) and read_only)


def is_storing(node: Node) -> bool:
    """Whether the node has taken in the bitmaps of its image, and the image is out of date."""
    return node.bitmaps.has_adopted and node.active and not node.mode.read_only


async def store_at_close(node: Node) -> None:
    """Store what there is before the node is closed. A failure is told, as there is nobody to answer it to."""
    store = node.driver.bitmap_store
    if store is not None and is_storing(node):
        try:
            await store.store(node.bitmaps.persistent)
        except QmpError as error:
            node.driver.host.warn(_lost(node, error))


def _lost(node: Node, error: QmpError) -> str:
    return f"qsd: Lost persistent bitmaps during inactivation of node '{node.name}': {error.desc}"


@attrs.define(eq=False)
class StopWriting(Action):
    """The image gets the bitmaps of a node that is going to be inactive or read-only. The node is held.

    One that is read-only has nothing to store, and hands them over all the same.
    """

    node: Node
    is_inactivation: bool = attrs.field(kw_only=True)
    _must_store: bool = attrs.field(default=False, init=False)
    _was_aborted: bool = attrs.field(default=False, init=False)

    @property
    def _store(self) -> BitmapStore:
        store = self.node.driver.bitmap_store
        assert store is not None
        return store

    async def prepare(self) -> None:
        """Store them."""
        bitmaps = self.node.bitmaps.persistent
        if self.is_inactivation:
            for bitmap in bitmaps:
                # Somebody shows it who would not see what the next owner does. The reference asserts.
                bitmap.check(Bar.BUSY)
        self._must_store = is_storing(self.node)
        if not self._must_store:
            return
        try:
            await self._store.store(bitmaps)
        except QmpError as error:
            if not self.is_inactivation:
                raise
            self.node.driver.host.warn(_lost(self.node, error))
            raise QmpError(errno_text(errno.EINVAL)) from None
        except BaseException:
            # Cut off somewhere, when the image may have them already.
            self.abort()
            with shield():
                await self.clean()
            raise

    def commit(self) -> None:
        """Another owner may change them; or nobody."""
        if self.is_inactivation:
            self.node.bitmaps.disown()
        else:
            for bitmap in self.node.bitmaps.persistent:
                bitmap.is_read_only = True

    def abort(self) -> None:
        """The node goes on: what the image holds will be out of date."""
        self._was_aborted = self._must_store

    async def clean(self) -> None:
        """Say so in the image."""
        if self._was_aborted:
            try:
                await self._store.mark_in_use()
            except (OSError, MemoryError) as error:
                log.error("bitmaps of node '%s' pass for clean in its image: %s", self.node.name, error)


@attrs.define(eq=False)
class StartWriting(Action):
    """A node has become active or writable; it is held until its bitmaps are ready.

    Stands before the actions for the node's children, so that these serve requests again when it is cleaned.
    ``failures`` gets what went wrong, with the node, which is then held once more.
    """

    node: Node
    failures: list[tuple[Node, Exception]]
    is_activation: bool = attrs.field(kw_only=True)
    _was_committed: bool = attrs.field(default=False, init=False)

    def commit(self) -> None:
        """There is something to do once all is committed."""
        self._was_committed = True

    async def clean(self) -> None:
        """Load the bitmaps, or mark those that are loaded."""
        if not self._was_committed:
            return
        try:
            await self._start()
        except FAILURES as error:
            told = QmpError(errno_text(error.errno or 0)) if isinstance(error, OSError) else error
            self.failures.append((self.node, told))
            await self.node.hold()

    async def _start(self) -> None:
        node = self.node
        store = node.driver.bitmap_store
        if self.is_activation:
            try:
                await node.driver.activate()
                node.refresh()
                await load(node)
            except QmpError as error:
                if not node.driver.is_format:
                    raise
                raise error.prefixed(f"Could not reopen {node.driver.name} layer: ") from None
            return
        await node.driver.become_writable()
        if store is not None:
            await _mark_in_use(store)
            for bitmap in node.bitmaps.persistent:
                bitmap.is_read_only = False
