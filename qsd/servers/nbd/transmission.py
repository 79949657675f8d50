"""The transmission phase of one NBD client: everything that has arrived in one pass, one send for the answers.

A request's successful reply is laid out when the request is parsed: header in front, room for the data behind, in
a slab. When the batch comes back without an error and in order, as it does when the page cache holds the data, the
answer to it is one contiguous piece of the slab. Replies that end later or fail are sent in pieces.

Backpressure: what a client has in flight or unsent is bounded (``MAX_REQUESTS``, ``MAX_BYTES``); beyond it the
socket is not read, and the client waits.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Callable
from functools import partial

from qsd.drivers.gather import Callback
from qsd.drivers.lending import LEND_MIN
from qsd.host.reactor import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, SLICE_NS, Reactor, Registration
from qsd.messages import Flag, Loan, Op, ReplyQueue, Request
from qsd.servers.nbd.buffers import Pool, Receive, Slab
from qsd.servers.nbd.incoming import Incoming
from qsd.servers.nbd.outgoing import Outgoing
from qsd.servers.nbd.replies import Encoder
from qsd.servers.nbd.spot_reads import SpotReads, Target, TransmissionStatistics
from qsd.wire.nbd import constants as c
from qsd.wire.nbd import transmission as wire

READ = Op.READ.value
MAY_LEND = Flag.MAY_LEND.value
WRITE = Op.WRITE.value
MAX_LENGTH = c.MAX_PAYLOAD

# Requests one client may have in flight or unsent. The reference takes 16; fio and the kernel send up to 128.
MAX_REQUESTS = 256
# Bytes of replies and payloads one client may hold. A single request larger than what is left is taken when the
# client has nothing else under way.
MAX_BYTES = 8 << 20
# What one BLOCK_STATUS counts as until it is answered: it may find thousands of extents.
STATUS_BYTES = 256 << 10
# Replies are laid out for about this much before they are submitted and sent: stays in the CPU's cache.
BATCH_BYTES = 1 << 20

# Cookie; slab, start and end of the prepared reply (start -1: none is prepared); the receive buffer of a write's
# payload; offset and length as the client sent them; the command type; the block status contexts wanted.
Tag = tuple[int, Slab | None, int, int, Receive | None, int, int, int, tuple[int, ...]]


class Transmission:
    """See the module. ``ended(reason)`` is called once: the client has gone and nothing is in flight."""

    def __init__(
        self,
        sock: socket.socket,
        reactor: Reactor,
        target: Target,
        encoder: Encoder,
        pool: Pool,
        *,
        alignment: int,
        leftover: bytes,
        ended: Callable[[str], None],
        crashed: Callable[[Exception], None],
    ) -> None:
        self._sock = sock
        self._reactor = reactor
        self._target = target
        self._encoder = encoder
        self._alignment = alignment
        self._ended = ended
        self._crashed = crashed
        self.stats = TransmissionStatistics()
        self._replies = ReplyQueue(self._notified)
        self._durable_trims = Callback(self._trimmed)
        self._in = Incoming(pool, leftover, encoder.request_size)
        self._out = Outgoing(sock, pool)
        self._spot_reads = SpotReads(target, encoder, self._out, self.stats)
        self._submitted = 0  # parsed, not completed
        self._payload_bytes = 0  # of writes not completed, and what block status may take
        self._closing = ""  # why no more is read; the connection ends when the answers are out
        self._gone = False  # the socket is closed
        self._registration: Registration | None = None

    # -- life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take over the socket."""
        self._sock.setblocking(False)
        self._registration = self._reactor.register(self._sock.fileno(), self._ready, self._crashed)
        if self._in.end:
            self._reactor.defer(self._work, self._crashed)
        else:
            self._replies.armed = True

    @property
    def in_flight(self) -> int:
        """Requests submitted and not completed."""
        return self._submitted

    def disconnect(self, reason: str) -> None:
        """Drop the client now; what is in flight goes on and ends unseen."""
        if self._gone:
            return
        self._gone = True
        self._closing = self._closing or reason
        if self._registration is not None:
            self._reactor.unregister(self._registration)
        # shutdown as well: close alone does not end a connection whose descriptor was inherited somewhere.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._out.drop()
        self._replies.armed = True
        self._finish_if_idle()

    def _finish_if_idle(self) -> None:
        if self._submitted > 0 or self._replies.ready:
            return
        ended, self._ended = self._ended, _ignore
        self._out.rest()
        self._in.let_go()
        self._replies.armed = False
        ended(self._closing)

    # -- events -----------------------------------------------------------------------------------------------

    def _ready(self, events: int) -> bool:
        if events & EPOLLOUT:
            self._send()
        if self._gone:
            return False
        before = self.stats.requests
        if events & (EPOLLIN | EPOLLHUP | EPOLLERR):
            self._receive()
        else:
            self._work()
        return self.stats.requests == before + 1 and not self._out.requests and not self._gone

    def _receive(self) -> None:
        room = self._in.room()
        try:
            count = self._sock.recv_into(room)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.disconnect(error.strerror or "connection lost")
            return
        if not count:
            self.disconnect(self._closing or "end of file")
            return
        self.stats.bytes_received += count
        self._in.end += count
        self._work()

    def _notified(self) -> None:
        self._reactor.defer(self._work, self._crashed)

    def _work(self) -> None:
        """Parse, submit, collect and send until nothing more can be done now, or for ``SLICE_NS``."""
        replies = self._replies
        replies.armed = False
        incoming, out = self._in, self._out
        queue = out.queue
        clock = time.perf_counter_ns
        end = clock() + SLICE_NS
        goes_on = False
        while True:
            batch = None
            is_whole = incoming.end - incoming.position >= incoming.wanted
            if is_whole and not self._closing and not (queue and out.reply_bytes >= BATCH_BYTES):
                batch = self._parse()
                if batch:
                    count = len(batch)
                    out.requests += count
                    self._submitted += count
                    self.stats.requests += count
                    try:
                        self._target.submit(batch)
                    except Exception:
                        # The connection ends, and nobody knows which of these ever will.
                        self._submitted -= count
                        raise
            if replies.ready:
                self._collect()
            elif not batch and not queue:
                break
            if queue:
                owed = out.requests, out.reply_bytes
                self._send()
                # What has left makes room for requests that have arrived already, which no event would announce.
                if not batch and not replies.ready and owed == (out.requests, out.reply_bytes):
                    break
            if clock() > end and not self._gone:
                goes_on = True
                break
        replies.armed = True
        if self._gone:
            self._finish_if_idle()
            return
        if not out.requests:
            if self._closing:
                self.disconnect(self._closing)
                return
            out.rest()
        # Being able to send is an event that comes at once, when everybody else has had a turn.
        events = EPOLLOUT if queue or goes_on else 0
        # Nothing is added to what could not be parsed yet: that would grow for as long as the client sends.
        if incoming.end - incoming.position < incoming.wanted and not self._closing and not self._is_full():
            events |= EPOLLIN
        registration = self._registration
        if registration is not None and events != registration.events:
            self._reactor.set_events(registration, events)

    def _is_full(self) -> bool:
        return self._out.requests >= MAX_REQUESTS or self._out.reply_bytes + self._payload_bytes >= MAX_BYTES

    # -- parsing ----------------------------------------------------------------------------------------------

    def _parse(self) -> list[Request]:
        """Turn what has arrived into a batch, at most about ``BATCH_BYTES`` of replies and payloads."""
        incoming, out, spot_reads = self._in, self._out, self._spot_reads
        if incoming.skip:
            incoming.position = incoming.skipped(incoming.position)
        header_size = incoming.wanted = self._encoder.request_size
        room = MAX_REQUESTS - out.requests
        budget = MAX_BYTES - out.reply_bytes - self._payload_bytes
        if budget > BATCH_BYTES:
            budget = BATCH_BYTES
        elif not out.requests:
            budget = 1
        spot_reads.begin()
        # Most of what arrives are plain reads and nothing else. The low byte of the type is 0 in those.
        position = incoming.position
        if budget > 0 and incoming.end - position >= header_size and not incoming.buffer.memory[position + 7]:
            count, size = spot_reads.serve(incoming, room, budget)
            room -= count
            budget -= size
        batch: list[Request] = []
        if incoming.end - incoming.position >= header_size:
            self._parse_usual(batch, room, budget)
        return batch

    def _parse_usual(self, batch: list[Request], room: int, budget: int) -> None:
        """Parse at most ``room`` requests, until ``budget`` bytes are reached."""
        encoder = self._encoder
        out = self._out
        header_size = encoder.request_size
        unpack = encoder.unpack_request
        request_magic = encoder.request_magic
        write_flags = encoder.plain_write_flags
        size = encoder.size
        writable, base_flags = encoder.writable, encoder.base_flags
        read_head = encoder.read_head
        pack_read, read_start = encoder.pack_read, encoder.read_start
        pack_done, done_size = encoder.pack_done, encoder.done_size
        alignment = self._alignment
        replies = self._replies
        incoming, spot_reads = self._in, self._spot_reads
        receive = incoming.buffer
        view, memory = receive.view, receive.memory
        position, end = incoming.position, incoming.end
        slab = out.slab or out.fresh_slab(0)
        used, slab_size, slab_memory, slab_view = slab.used, slab.size, slab.memory, slab.view
        while end - position >= header_size and room > 0 and budget > 0:
            magic, flags, kind, cookie, offset, length = unpack(memory, position)
            if magic == request_magic and 0 < length <= MAX_LENGTH and offset + length <= size:
                if not kind and not flags:
                    if spot_reads.find is not None and length < LEND_MIN:
                        slab.used = used
                        incoming.position = position
                        count, read = spot_reads.serve(incoming, room, budget)
                        slab = out.slab or slab
                        used, slab_size, slab_memory, slab_view = slab.used, slab.size, slab.memory, slab.view
                        if count:
                            position = incoming.position
                            budget -= read
                            room -= count
                            continue
                    data = used + read_head
                    if alignment > 1:
                        data = -(-data // alignment) * alignment
                    if data + length > slab_size:
                        slab.used = used
                        slab = out.fresh_slab(length + read_head + alignment)
                        slab_size, slab_memory, slab_view = slab.size, slab.memory, slab.view
                        data = -(-read_head // alignment) * alignment
                    start, used = data - read_head, data + length
                    pack_read(slab_memory, start, read_start, cookie, length + 8, offset)
                    slab.outstanding += 1
                    out.reply_bytes += used - start
                    tag: Tag = (cookie, slab, start, used, None, offset, length, kind, ())
                    lend = MAY_LEND if length >= LEND_MIN else 0
                    batch.append(Request(READ, offset, length, slab_view[data:used], replies, lend, tag))
                    position += header_size
                    budget -= length
                    room -= 1
                    continue
                if kind == 1 and flags == write_flags and writable:
                    data = position + header_size
                    if end - data < length:
                        incoming.wanted = header_size + length
                        break
                    start = used
                    used = start + done_size
                    if used > slab_size:
                        slab.used = start
                        slab = out.fresh_slab(done_size)
                        slab_size, slab_memory, slab_view = slab.size, slab.memory, slab.view
                        start, used = 0, done_size
                    pack_done(slab_memory, start, cookie, offset)
                    slab.outstanding += 1
                    out.reply_bytes += done_size
                    self._payload_bytes += length
                    receive.lent += 1
                    position = data + length
                    tag = (cookie, slab, start, used, receive, offset, length, kind, ())
                    batch.append(Request(WRITE, offset, length, view[data:position], replies, base_flags, tag))
                    budget -= length
                    room -= 1
                    continue
            slab.used = used
            taken = self._uncommon(batch, position, end)
            slab = out.slab or slab
            used, slab_size, slab_memory, slab_view = slab.used, slab.size, slab.memory, slab.view
            if not taken:
                break
            position = min(end, position + taken)
            if self._closing:
                break
            if incoming.skip:
                position = incoming.skipped(position)
            room -= 1
            budget = min(budget, MAX_BYTES - out.reply_bytes - self._payload_bytes)
        slab.used = used
        incoming.position = position

    def _uncommon(self, batch: list[Request], position: int, end: int) -> int:
        """One request that is not a plain read or write: bytes taken, 0 when more must arrive first."""
        encoder = self._encoder
        out = self._out
        receive = self._in.buffer
        header = encoder.decode(receive.memory, position)
        payload = encoder.payload_length(header)
        verdict = encoder.check(header)
        data = position + encoder.request_size
        if verdict is not None:
            self.stats.refused += 1
            out.requests += 1
            out.add_bytes(encoder.error(header, verdict.errno, verdict.text))
            if verdict.drop:
                self._closing = verdict.text
            self._in.skip = payload
            return encoder.request_size
        if end - data < payload:
            self._in.wanted = encoder.request_size + payload
            return 0
        body = receive.view[data : data + payload]
        if header.kind == c.CMD_DISC:
            self._closing = "client disconnected"
            return encoder.request_size
        op, flags = encoder.translate(header)
        if op is Op.BLOCK_STATUS:
            header, contexts, problem = encoder.contexts(header, body)
            if problem:
                out.requests += 1
                out.add_bytes(encoder.error(header, errno.EINVAL, problem))
                return encoder.request_size + payload
            if not encoder.needs_node(contexts):
                out.requests += 1
                self.stats.requests += 1
                out.add_bytes(encoder.block_status(header, (), contexts))
                return encoder.request_size + payload
            request = self._without_reply(op, header, contexts)
        else:
            request = self._with_reply(op, header, body if op is Op.WRITE else None, flags)
        if op is Op.DISCARD and header.flags & c.CMD_FLAG_FUA:
            request.reply = self._durable_trims
        batch.append(request)
        return encoder.request_size + payload

    def _without_reply(self, op: Op, header: wire.RequestHeader, contexts: tuple[int, ...]) -> Request:
        tag = (header.cookie, None, -1, -1, None, header.offset, header.length, header.kind, contexts)
        request = Request(op.value, header.offset, header.length, None, self._replies, 0, tag)
        request.extents_wanted = self._encoder.extents_wanted(header)
        self._payload_bytes += STATUS_BYTES
        return request

    def _with_reply(self, op: Op, header: wire.RequestHeader, body: memoryview | None, flags: int) -> Request:
        encoder = self._encoder
        out = self._out
        is_read = op is Op.READ
        head = encoder.done_size
        if is_read:
            head = encoder.read_head if header.length else encoder.empty_size
        room = header.length if is_read else 0
        slab = out.slab or out.fresh_slab(0)
        data = -(-(slab.used + head) // self._alignment) * self._alignment
        if data + room > slab.size:
            slab = out.fresh_slab(room + head + self._alignment)
            data = -(-(slab.used + head) // self._alignment) * self._alignment
        start, stop = data - head, data + room
        if is_read and header.length:
            encoder.pack_read(
                slab.memory, start, encoder.read_start, header.cookie, header.length + 8, header.offset
            )
        elif is_read:
            encoder.pack_empty(slab.memory, start, header.cookie, header.offset)
        else:
            encoder.pack_done(slab.memory, start, header.cookie, header.offset)
        slab.used = stop
        slab.outstanding += 1
        out.reply_bytes += stop - start
        receive = None
        if body is not None:
            receive = self._in.buffer
            receive.lent += 1
            self._payload_bytes += header.length
        buffer = slab.view[data:stop] if is_read else body
        tag = (header.cookie, slab, start, stop, receive, header.offset, header.length, header.kind, ())
        return Request(op.value, header.offset, header.length, buffer, self._replies, flags, tag)

    def _trimmed(self, request: Request) -> None:
        """A TRIM with FUA has ended: it is answered when a flush has."""
        if request.error:
            self._replies.put(request)
            return
        flush = Request(Op.FLUSH.value, 0, 0, None, self._replies, 0, request.tag)
        self._reactor.defer(partial(self._target.submit, [flush]), self._crashed)

    # -- answering --------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Queue the answers to what has ended, joining neighbours."""
        ready = self._replies.ready
        self._replies.ready = []
        self._submitted -= len(ready)
        out = self._out
        current: Slab | None = None
        first = last = count = 0
        for request in ready:
            cookie, slab, start, stop, receive, offset, length, kind, contexts = request.tag
            if receive is not None:
                self._payload_bytes -= length
                self._in.returned(receive)
            elsewhere = request.result
            if start == last and slab is current and elsewhere is None and not request.error:
                last = stop
                count += 1
                continue
            if current is not None:
                out.add(current.view[first:last], current, count)
                current = None
            if slab is None:
                self._payload_bytes -= STATUS_BYTES
            if request.error or slab is None:
                header = wire.RequestHeader(0, 0, kind, cookie, offset, length)
                out.add_bytes(self._encoder.answer(header, request, contexts))
                if slab is not None:
                    out.forget_slot(slab, stop - start)
                continue
            if elsewhere is not None:
                add = out.add_loan if isinstance(elsewhere, Loan) else out.add_pieces
                add(slab.view[start : stop - length], elsewhere, slab)
                continue
            current, first, last, count = slab, start, stop, 1
        if current is not None:
            out.add(current.view[first:last], current, count)
        if self._gone:
            out.drop()

    def _send(self) -> None:
        try:
            self._out.send()
        except OSError as error:
            self.disconnect(error.strerror or "connection lost")


def _ignore(_reason: str) -> None:
    """Nobody is told a second time."""
