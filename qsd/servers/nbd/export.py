"""An NBD export: what a client sees of a node, and who its clients are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from trio_util import RepeatedEvent

from qsd.actors.edges import Edge
from qsd.block.dirty import NamedBitmap
from qsd.servers.exports import ExportActor, Exports
from qsd.wire.nbd import constants as c
from qsd.wire.nbd.handshake import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP, ExportInfo

if TYPE_CHECKING:
    from qsd.servers.nbd.server import NbdConnection, NbdService

# The number of the first bitmap's metadata context: base:allocation and qemu:allocation-depth are 0 and 1.
FIRST_BITMAP: Final = 2


class NbdExport(ExportActor):
    """One export: a view of a node under a name."""

    type_name = "nbd"

    def __init__(
        self,
        identifier: str,
        options: Any,
        edge: Edge,
        bitmaps: Sequence[NamedBitmap],
        service: NbdService,
        exports: Exports,
    ) -> None:
        super().__init__(identifier, options, exports, service.reactor)
        self.edge = edge
        self.export_name: str = edge.node_name if options.name is None else options.name
        self.writethrough = bool(options.writethrough)
        self._multi_conn = service.max_connections != 1
        # By the number of their metadata context; the export keeps them from being changed.
        self.bitmaps = dict(enumerate(bitmaps, FIRST_BITMAP))
        for bitmap in bitmaps:
            bitmap.is_busy = True
        self.connections: set[NbdConnection] = set()
        self._left = RepeatedEvent()

    def describe(self) -> ExportInfo:
        """The export as a client sees it now."""
        limits = self.edge.limits
        contexts = [(0, BASE_ALLOCATION)]
        if self._options.allocation_depth:
            contexts.append((1, ALLOCATION_DEPTH))
        contexts.extend((number, f"{DIRTY_BITMAP}{bitmap.name}") for number, bitmap in self.bitmaps.items())
        return ExportInfo(
            name=self.export_name,
            size=self.edge.length,
            description=self._options.description or "",
            read_only=not self._options.writable,
            multi_conn=self._multi_conn,
            min_block=limits.request_alignment,
            max_block=min(limits.max_transfer or c.MAX_PAYLOAD, c.MAX_PAYLOAD),
            contexts=tuple(contexts),
            token=self,
        )

    def has_clients(self) -> bool:
        """True while a client is connected."""
        return bool(self.connections)

    def clients(self) -> Sequence[NbdConnection]:
        """The connections."""
        return list(self.connections)

    def resized(self) -> None:
        """Cannot happen while it is exported: a client is told the length once."""

    def joined(self, connection: NbdConnection) -> None:
        """A client has chosen this export."""
        self.connections.add(connection)

    def left(self, connection: NbdConnection) -> None:
        """A client has gone and nothing of it is in flight."""
        self.connections.discard(connection)
        self._left.set()

    async def close(self) -> None:
        """Drop the clients; return when nothing is in flight."""
        for connection in list(self.connections):
            connection.disconnect("export is going away")
        while self.connections:
            await self._left.wait()
        for bitmap in self.bitmaps.values():
            bitmap.is_busy = False
        self.bitmaps = {}

    async def started(self) -> None:
        """Let the iothread it names rule the polling."""
        self.rule_polling()

    def statistics(self) -> dict[str, Any]:
        """The actor's facts, and its clients."""
        return super().statistics() | {"name": self.export_name, "clients": len(self.connections)}
