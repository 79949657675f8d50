"""What is done to dirty bitmaps, as actions that can be undone: the commands, and parts of a transaction.

Each sees what those before it have prepared (``graph_actions``).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import attrs
import trio

from qsd.actors.edges import info_of
from qsd.actors.graph_actions import GraphAction
from qsd.block.bitmap import DirtyBitmap
from qsd.block.dirty import Bar, NamedBitmap, check_granularity, check_mergeable, check_size, default_granularity
from qsd.drivers.base import ChildRole
from qsd.errors import QmpError
from qsd.host.memory import give_back_memory

if TYPE_CHECKING:
    from qsd.actors.node import Node
    from qsd.actors.topology import Topology

log = logging.getLogger("qsd.graph")

# Steps of a merge between two chances for others to run (1 ms).
STEPS = 64
UNKNOWN_NODE = "Node '{}' not found"
UNKNOWN_DEVICE = "Cannot find device='{}' nor node-name='{}'"


def find_bitmap(topology: Topology, node_name: str, name: str) -> tuple[Node, NamedBitmap]:
    """A node and a bitmap of it; raises QmpError."""
    node = topology.find(node_name, UNKNOWN_NODE)
    return node, node.bitmaps.find(name)


def _find_below(node: Node, name: str) -> tuple[Node, NamedBitmap]:
    """The first bitmap of that name in the node, what it filters, or its backing chain."""
    place: Node | None = node
    while place is not None:
        found = place.bitmaps.get(name)
        if found is not None:
            return place, found
        wanted = ChildRole.FILTERED if place.driver.is_filter else ChildRole.COW
        edges = info_of(place).children.values()
        place = next((edge.node for edge in edges if edge.role is wanted), None)
    raise QmpError(f"Bitmap '{name}' is not found")


def find_exported(topology: Topology, node: Node, wanted: str | tuple[str, str], *, writable: bool) -> NamedBitmap:
    """The bitmap that an export of ``node`` shows: of the node or what its data comes from, or of any node.

    Raises QmpError when there is none, or it is in use, or would not stay as it is: a client of a read-only export
    may rely on that. As in the reference, nobody asks that of a bitmap that is named with its node.
    """
    if isinstance(wanted, str):
        holder, bitmap = _find_below(node, wanted)
        if not writable and not holder.mode.read_only and bitmap.is_recording:
            raise QmpError(f"Enabled bitmap '{wanted}' incompatible with readonly export")
    else:
        _holder, bitmap = find_bitmap(topology, *wanted)
    bitmap.check(Bar.UNUSABLE)
    return bitmap


@attrs.define(eq=False, kw_only=True)
class BitmapAction(GraphAction):
    """An action on the bitmap ``name`` of the node ``node_name``."""

    # Whether writes that are under way would end up in the wrong bitmap.
    must_drain: ClassVar[bool] = True

    topology: Topology
    node_name: str
    name: str

    @property
    def concerned(self) -> list[Node]:
        """The nodes to be drained; an unknown one is for ``prepare`` to complain about."""
        found = self.topology.nodes.get(self.node_name)
        return [found] if found is not None and self.must_drain else []

    @property
    def needed(self) -> set[tuple[str, str]]:
        """The bitmaps it works on, by the names of their nodes and their own."""
        return {(self.node_name, self.name)}

    def check(self) -> None:
        """Find what the action is about. Raises QmpError when it cannot be done."""

    async def stage(self, earlier: Sequence[GraphAction]) -> None:
        """Complain early, before later actions make files; of what is still to be added nothing is known."""
        try:
            async with self.topology.lock:
                self.check()
        except QmpError:
            needed = self.needed
            if not any(isinstance(one, AddBitmap) and (one.node_name, one.name) in needed for one in earlier):
                raise


@attrs.define(eq=False, kw_only=True)
class AddBitmap(BitmapAction):
    """block-dirty-bitmap-add. ``granularity`` in bytes."""

    granularity: int | None = None
    is_persistent: bool = False
    is_disabled: bool = False
    node: Node = attrs.field(init=False)
    made: NamedBitmap = attrs.field(init=False)

    def check(self) -> None:
        """Make the bitmap."""
        self.node = node = self.topology.find(self.node_name, UNKNOWN_DEVICE)
        if not self.name:
            raise QmpError("Bitmap name cannot be empty")
        if self.granularity is None:
            granularity = default_granularity(node.driver.image_facts().get("cluster-size"))
        else:
            granularity = check_granularity(self.granularity)
        if self.is_persistent:
            if node.mode.read_only or not node.active:
                raise QmpError(f"Cannot add a persistent bitmap to read-only or inactive node '{node.name}'")
            self._check_store(DirtyBitmap.data_length_of(node.length, granularity))
        check_size(node.length, granularity)
        bits = DirtyBitmap(node.length, granularity)
        made = NamedBitmap(self.name, bits, is_recording=not self.is_disabled, is_persistent=self.is_persistent)
        node.bitmaps.check_new(self.name)
        self.made = made

    async def prepare(self) -> None:
        """Take it in."""
        self.check()
        self.node.bitmaps.add(self.made)

    def _check_store(self, length: int) -> None:
        node = self.node
        store = node.driver.bitmap_store
        if store is None:
            raise QmpError(f"Can't store persistent bitmaps to {node.name}: Operation not supported")
        try:
            store.check(self.name, length, node.bitmaps.persistent)
        except QmpError as error:
            raise error.prefixed(f"Can't make bitmap '{self.name}' persistent in '{node.name}': ") from None

    def abort(self) -> None:
        """Take it away again."""
        self.node.bitmaps.remove(self.made)


@attrs.define(eq=False, kw_only=True)
class _OnOne(BitmapAction):
    """An action on a bitmap that is there."""

    node: Node = attrs.field(init=False)
    bitmap: NamedBitmap = attrs.field(init=False)

    def check(self) -> None:
        """Find the bitmap."""
        self.node, self.bitmap = find_bitmap(self.topology, self.node_name, self.name)


@attrs.define(eq=False, kw_only=True)
class RemoveBitmap(_OnOne):
    """block-dirty-bitmap-remove. Until it is committed the bitmap keeps its name and is busy."""

    must_drain = False

    def check(self) -> None:
        """Find the bitmap, see whether it may go."""
        super().check()
        self.bitmap.check(Bar.BUSY)
        if self.bitmap.is_persistent and (self.node.mode.read_only or not self.node.active):
            raise QmpError(
                f"Cannot remove persistent bitmap '{self.name}': no write access to node '{self.node.name}'"
            )

    async def prepare(self) -> None:
        """Take it out of use."""
        self.check()
        self.bitmap.is_busy = True

    def commit(self) -> None:
        """Forget it."""
        self.node.bitmaps.remove(self.bitmap)

    def abort(self) -> None:
        """Put it back into use."""
        self.bitmap.is_busy = False

    async def settle(self) -> None:
        """Take it out of the image. Where that fails it stays there, marked in use, until bitmaps are stored."""
        self.bitmap.bits.clear()
        give_back_memory()
        node = self.node
        store = node.driver.bitmap_store
        if not self.bitmap.is_persistent or store is None:
            return
        async with self.topology.lock:
            # Others may have had their turn since; what they did has stored the bitmaps without this one.
            if self.topology.nodes.get(node.name) is node and node.active and not node.mode.read_only:
                try:
                    await store.remove(self.name)
                except OSError as error:
                    log.warning("bitmap '%s' stays in the image of node '%s': %s", self.name, node.name, error)


@attrs.define(eq=False, kw_only=True)
class ClearBitmap(_OnOne):
    """block-dirty-bitmap-clear."""

    before: DirtyBitmap = attrs.field(init=False)

    def check(self) -> None:
        """Find the bitmap, see whether it may be changed."""
        super().check()
        self.bitmap.check(Bar.ANY)

    async def prepare(self) -> None:
        """Clear it."""
        self.check()
        self.before = self.bitmap.bits.clear()

    def abort(self) -> None:
        """Bring the content back."""
        self.bitmap.bits.take_over(self.before)


@attrs.define(eq=False, kw_only=True)
class SwitchBitmap(_OnOne):
    """block-dirty-bitmap-enable and -disable."""

    enabled: bool
    was_recording: bool = False

    def check(self) -> None:
        """Find the bitmap, see whether it can be used."""
        super().check()
        self.bitmap.check(Bar.UNUSABLE)

    async def prepare(self) -> None:
        """Switch it."""
        self.check()
        self.was_recording = self.bitmap.is_recording
        self.node.bitmaps.record(self.bitmap, enabled=self.enabled)

    def abort(self) -> None:
        """Switch it back."""
        self.node.bitmaps.record(self.bitmap, enabled=self.was_recording)


@attrs.define(eq=False, kw_only=True)
class MergeBitmaps(_OnOne):
    """block-dirty-bitmap-merge. ``sources``: pairs of a node's and a bitmap's name."""

    sources: Sequence[tuple[str, str]]
    found: list[NamedBitmap] = attrs.field(init=False)
    before: DirtyBitmap = attrs.field(init=False)

    @property
    def needed(self) -> set[tuple[str, str]]:
        """The target and the sources."""
        return {*super().needed, *self.sources}

    def check(self) -> None:
        """Find all bitmaps, see whether they can be added up."""
        super().check()
        self.found = []
        for node_name, name in self.sources:
            _node, source = find_bitmap(self.topology, node_name, name)
            check_mergeable(self.bitmap, source)
            self.found.append(source)

    async def prepare(self) -> None:
        """Add all of them, or none."""
        self.check()
        target = self.bitmap
        merged = target.bits.copy()
        for source in self.found:
            for number, _step in enumerate(merged.merge(source.bits)):
                if not number % STEPS:
                    await trio.lowlevel.checkpoint()
        self.before = target.bits.clear()
        target.bits.take_over(merged)

    def abort(self) -> None:
        """Bring the content back."""
        self.bitmap.bits.take_over(self.before)
