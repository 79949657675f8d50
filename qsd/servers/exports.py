"""All exports by id, whatever their type: adding, deleting, the query, the event."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import attrs
from trio_util import RepeatedEvent

from qsd.actors.bitmaps import find_exported
from qsd.actors.core import Actor
from qsd.actors.edges import Edge, RootEdge, RootOptions
from qsd.actors.events import EventBus
from qsd.actors.graph import Graph
from qsd.actors.objects import Objects
from qsd.actors.supervisor import Floor, Supervisor
from qsd.block.dirty import NamedBitmap
from qsd.block.names import is_well_formed
from qsd.block.permissions import Perm
from qsd.errors import QmpError
from qsd.host.reactor import PollPolicy, Reactor


class Export(Protocol):
    """What every type of export is to the table."""

    type_name: str

    def has_clients(self) -> bool:
        """True while a client holds it (safe deletion refuses)."""

    def clients(self) -> Sequence[Actor]:
        """The actors of its clients, where clients have actors."""

    def resized(self) -> None:
        """The node has another length, or it is another node."""

    async def close(self) -> None:
        """Drop clients; return when nothing is in flight."""


@attrs.define(eq=False)
class Entry:
    """One export in the table. Until it ``is_up`` nobody finds it."""

    id: str
    export: Export
    actor: Actor
    edge: RootEdge
    is_up: bool = False
    is_shutting_down: bool = False


@attrs.frozen
class Kind:
    """A type of export: what checks its options (and raises QmpError), what makes one, what it needs of the node.

    ``more`` are permissions besides reading, and writing where the export is writable.
    """

    check: Callable[[Any], None]
    make: Callable[[str, Any, RootEdge], Awaitable[Any]]
    more: Callable[[Any], Perm] = lambda _options: Perm.NONE
    unshared: Perm = Perm.NONE
    allows_iothreads: bool = False


class Exports:
    """The table. ``kinds`` holds the types of exports by name."""

    def __init__(self, supervisor: Supervisor, graph: Graph, objects: Objects, events: EventBus) -> None:
        self._supervisor = supervisor
        self._graph = graph
        self._objects = objects
        self._events = events
        self._entries: dict[str, Entry] = {}
        # The ids of exports that are being added.
        self._coming: set[str] = set()
        self._forgotten = RepeatedEvent()
        self.kinds: dict[str, Kind] = {}

    def entries(self) -> list[Entry]:
        """All exports, newest first."""
        return [entry for entry in reversed(self._entries.values()) if entry.is_up]

    def of_type(self, type_name: str) -> list[Entry]:
        """All exports of a type, newest first, and those that nobody finds yet."""
        return [entry for entry in reversed(self._entries.values()) if entry.export.type_name == type_name]

    def find(self, name: str) -> Entry | None:
        """The export with that id."""
        entry = self._entries.get(name)
        return entry if entry is not None and entry.is_up else None

    async def add(self, options: Any) -> None:
        """block-export-add. Raises QmpError; then nothing is left behind."""
        name = options.id
        if not is_well_formed(name):
            raise QmpError("Invalid block export id")
        if name in self._entries or name in self._coming:
            raise QmpError(f"Block export id '{name}' is already in use")
        kind = self.kinds[options.type.value]
        node = self._graph.find(options.node_name)
        self._check_iothread(options, kind)
        if options.writable and node.mode.read_only:
            raise QmpError("Cannot export read-only node as writable")
        kind.check(options)
        perm = Perm.CONSISTENT_READ | (Perm.WRITE if options.writable else Perm.NONE) | kind.more(options)
        use = RootOptions(
            perm,
            Perm.ALL & ~kind.unshared,
            allow_inactive=bool(options.allow_inactive),
            on_resize=lambda: self._resized(name),
            on_swap=lambda: self._resized(name),
        )
        # Others may add or delete exports whenever this waits: the id is taken before the first time.
        self._coming.add(name)
        try:
            edge = await self._graph.attach(node.name, use)
            try:
                kind.check(options)
                export = await kind.make(name, options, edge)
                entry = self._entries[name] = Entry(name, export, export, edge)
                await self._supervisor.start(export, Floor.EXPORTS)
                if entry.is_shutting_down:
                    # By what ends all exports. It may be told in the words for who comes after that.
                    await self._supervisor.stop(export)
                    kind.check(options)
                    raise QmpError(f"Export '{name}' is already shutting down")
                entry.is_up = True
            except BaseException:
                self._entries.pop(name, None)
                self._forgotten.set()
                await edge.detach()
                raise
        finally:
            self._coming.discard(name)

    def bitmaps_of(self, options: Any, edge: Edge) -> list[NamedBitmap]:
        """The dirty bitmaps an export names. Raises QmpError unless all of them can be shown as they are now."""
        found = []
        for wanted in options.bitmaps or ():
            name = wanted if isinstance(wanted, str) else (wanted.node, wanted.name)
            found.append(find_exported(self._graph.topology, edge.node, name, writable=bool(options.writable)))
        return found

    def policy_of(self, options: Any) -> PollPolicy | None:
        """How the iothread an export names wants to be polled, of several the most patient; None for none."""
        given = options.iothread
        names = (given,) if isinstance(given, str) else given or ()
        policies = [self._objects.iothreads.get(name).policy for name in names]
        return max(policies, key=lambda policy: policy.max_ns, default=None)

    def _resized(self, name: str) -> None:
        entry = self._entries.get(name)
        if entry is not None:
            entry.export.resized()

    def _check_iothread(self, options: Any, kind: Kind) -> None:
        given = options.iothread
        if given is None:
            return
        names = (given,) if isinstance(given, str) else given
        if not names:
            raise QmpError("The set of I/O threads must not be empty")
        if not isinstance(given, str) and options.fixed_iothread:
            raise QmpError("Cannot use fixed-iothread for a multi-threaded export")
        for name in names:
            self._objects.iothreads.get(name)
        if not isinstance(given, str) and not kind.allows_iothreads:
            raise QmpError("NBD export does not support multi-threading")

    def delete(self, name: str, *, hard: bool) -> None:
        """block-export-del: starts the end of an export; its event comes when it is gone. Raises QmpError."""
        entry = self.find(name)
        if entry is None:
            raise QmpError(f"Export '{name}' is not found")
        if entry.is_shutting_down:
            raise QmpError(f"Export '{name}' is already shutting down")
        if not hard and entry.export.has_clients():
            raise QmpError(f"export '{name}' still in use")
        self._begin_end(entry)

    def delete_all(self, type_name: str) -> None:
        """Delete every export of a type, hard; those that are being added are not added."""
        for entry in self.of_type(type_name):
            if not entry.is_up:
                entry.is_shutting_down = True
            elif not entry.is_shutting_down:
                self._begin_end(entry)

    async def wait_gone(self, type_name: str) -> None:
        """Return when there is no export of that type."""
        while self.of_type(type_name):
            await self._forgotten.wait()

    def _begin_end(self, entry: Entry) -> None:
        entry.is_shutting_down = True
        entry.actor.spawn(self._end, entry, name="end of the export")

    async def _end(self, entry: Entry) -> None:
        await entry.export.close()
        await self._forget(entry)
        self._supervisor.stop_soon(entry.actor)

    async def _forget(self, entry: Entry) -> None:
        try:
            await entry.edge.detach()
        finally:
            # A command and the daemon's end may both have come here, and waited.
            if self._entries.get(entry.id) is entry:
                del self._entries[entry.id]
                self._forgotten.set()
                self._events.emit("BLOCK_EXPORT_DELETED", {"id": entry.id})

    async def stopped(self, name: str) -> None:
        """The export's actor is going down by itself (shutdown, crash): take it off the graph and tell."""
        entry = self._entries.get(name)
        if entry is not None:
            entry.is_shutting_down = True
            if entry.is_up:
                await self._forget(entry)


class ExportActor(Actor, ABC):
    """What the actors of all exports have in common: their polling, and how they end."""

    kind = "export"

    def __init__(self, identifier: str, options: Any, exports: Exports, reactor: Reactor) -> None:
        super().__init__(f"export {identifier}")
        self.id = identifier
        self._options = options
        self._exports = exports
        self._reactor = reactor

    def rule_polling(self) -> None:
        """Let the iothread it names rule the polling, until it ends."""
        self._reactor.use_policy(self, self._exports.policy_of(self._options))

    @abstractmethod
    async def close(self) -> None:
        """Drop clients; return when nothing is in flight."""

    async def stopping(self) -> None:
        """End of the daemon, or of the export."""
        self._reactor.use_policy(self, None)
        try:
            await self.close()
        finally:  # where that was cut off, too
            await self._exports.stopped(self.id)
