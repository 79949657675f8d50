"""Runs of plain reads that find what they want in the page cache, answered where they are parsed."""

from __future__ import annotations

import os
from typing import Protocol

import attrs

from qsd.drivers.lending import LEND_MIN
from qsd.drivers.spot import Find, Finder, Spot
from qsd.messages import Request
from qsd.servers.nbd.incoming import Incoming
from qsd.servers.nbd.outgoing import Outgoing
from qsd.servers.nbd.replies import Encoder

# With less room a slab is not worth beginning a run in: any one answer fits.
MIN_ROOM = LEND_MIN + 64


class Target(Protocol):
    """What the connection serves: an export's edge to its node."""

    def submit(self, batch: list[Request]) -> None:
        """Pass requests on."""

    def spot(self) -> Spot | None:
        """How reads are found on the spot, for this epoch."""

    def served(self, count: int, size: int) -> None:
        """So many reads, of ``size`` bytes together, have been served on the spot."""


@attrs.define
class TransmissionStatistics:
    """What one client asked for."""

    requests: int = 0
    refused: int = 0
    bytes_received: int = 0


class SpotReads:
    """``find`` is what to ask for places until a read was not found, None from then on."""

    __slots__ = ("_encoder", "_finder", "_out", "_stats", "_target", "find")

    def __init__(self, target: Target, encoder: Encoder, out: Outgoing, stats: TransmissionStatistics) -> None:
        self._target = target
        self._finder = Finder(target)
        self._encoder = encoder
        self._out = out
        self._stats = stats
        self.find: Find | None = None

    def begin(self) -> None:
        """More has arrived."""
        self.find = self._finder.find()

    def serve(self, incoming: Incoming, room: int, budget: int) -> tuple[int, int]:
        """Answer the plain reads that come next, at most ``room`` and until ``budget`` bytes are reached.

        The answers are one piece of one slab. Returns how many were answered, and the bytes of data; none means
        that the first has to take the usual way.
        """
        find = self.find
        if find is None:
            return 0, 0
        encoder = self._encoder
        out = self._out
        slab = out.slab or out.fresh_slab(0)
        if slab.size - slab.used < MIN_ROOM:
            slab = out.fresh_slab(0)
        memory, view = slab.memory, slab.view
        head_size, start_of, pack = encoder.read_head, encoder.read_start, encoder.pack_read
        plain, size = encoder.plain_read, encoder.size
        layout = encoder.run_layout
        first = used = slab.used
        limit = min(used + budget, slab.size - MIN_ROOM)
        count = 0
        preadv = os.preadv
        position = incoming.position
        arrived = min((incoming.end - position) // layout.size, room)
        requests = incoming.buffer.view[position : position + arrived * layout.size]
        try:
            for kind, cookie, offset, length in layout.iter_unpack(requests):
                if kind != plain or not 0 < length < LEND_MIN or offset + length > size:
                    break
                data = used + head_size
                stop = data + length
                place = find(offset, length)
                if place is None:
                    break
                fd, where, how = place
                if preadv(fd, (view[data:stop],), where, how) != length:
                    self.find = None
                    break
                pack(memory, used, start_of, cookie, length + 8, offset)
                used = stop
                count += 1
                if used > limit:
                    break
        except OSError:
            # Not in the page cache, as a rule; then much else is not.
            self.find = None
        if not count:
            return 0, 0
        read = used - first - count * head_size
        incoming.position = position + count * layout.size
        slab.used = used
        out.add_laid(slab, first, used, count)
        self._stats.requests += count
        self._target.served(count, read)
        return count, read
