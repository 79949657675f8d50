"""The server's side of the fixed newstyle handshake, sans-IO.

Feed what arrived to ``receive`` (again, with nothing, while ``has_more``); send what ``take_output`` gives; stop
when ``result`` or ``failure`` is set.
A client's lie is bounded: options are read only when their length is allowed for that option (``_OPTIONS``), others
are skipped in a counter, so what is buffered never exceeds ``MAX_BUFFERED``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Protocol

import attrs

from qsd.wire import modified_utf8
from qsd.wire.nbd import constants as c

_OPTION = struct.Struct(">8sII")
_REPLY = struct.Struct(">QIII")

BASE_ALLOCATION = "base:allocation"
ALLOCATION_DEPTH = "qemu:allocation-depth"
DIRTY_BITMAP = "qemu:dirty-bitmap:"

# The longest option that is looked at: a name, and as many queries as fit one client's contexts.
MAX_OPTION_READ = 4 + c.MAX_STRING + 4 + 64 * (4 + c.MAX_STRING)
# Replies held at once, before the last one is added.
MAX_OUTPUT = 64 << 10
# Bytes of a name that is not known that are shown to the client.
SHOWN = 80
MAX_BUFFERED = MAX_OPTION_READ + _OPTION.size


@attrs.frozen
class ExportInfo:
    """An export as a client sees it. Sizes in bytes.

    ``contexts`` are the metadata contexts it offers, in the order of their numbers. Two may have the same name (the
    bitmaps of two nodes); a client that selects by name gets the first.
    """

    name: str
    size: int
    description: str = ""
    read_only: bool = True
    multi_conn: bool = True
    min_block: int = 1
    preferred_block: int = 4096
    max_block: int = c.MAX_PAYLOAD
    contexts: tuple[tuple[int, str], ...] = ((0, BASE_ALLOCATION),)
    token: object = None


class ExportDirectory(Protocol):
    """What exists, as the handshake asks for it."""

    def lookup(self, name: str) -> ExportInfo | None:
        """The export of that name."""

    def list(self) -> Sequence[ExportInfo]:
        """All exports."""


@attrs.frozen
class Negotiated:
    """The outcome of a handshake that succeeded; ``leftover`` are bytes the client sent behind it."""

    export: ExportInfo
    structured: bool
    extended: bool
    contexts: tuple[tuple[int, str], ...]
    leftover: bytes


class ServerHandshake:
    """One client's negotiation; see the module."""

    def __init__(self, exports: ExportDirectory) -> None:
        self._exports = exports
        self._output = bytearray(
            c.INIT_MAGIC + c.OPTS_MAGIC + struct.pack(">H", c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES)
        )
        self._input = bytearray()
        self._step: Callable[[], bool] = self._client_flags
        self.has_more = False
        self._skip = 0
        self._no_zeroes = self._is_fixed = False
        self.structured = False
        self.extended = False
        self._contexts: tuple[tuple[int, str], ...] = ()
        self._contexts_for: str | None = None
        self.result: Negotiated | None = None
        self.failure: str | None = None

    def take_output(self) -> bytes:
        """What has to be sent now."""
        output, self._output = bytes(self._output), bytearray()
        return output

    @property
    def is_over(self) -> bool:
        """True when there is a result or a failure."""
        return self.result is not None or self.failure is not None

    def complaint_of_loss(self, why: str, *, while_sending: bool) -> str | None:
        """What to log when the connection is lost now; None for a client that has not begun, or has said goodbye.

        Programs that look whether anybody listens, and those that only list exports, are no failures.
        """
        if self._step == self._client_flags or self.failure == "":
            return None
        if while_sending:
            return f"Unable to write to socket: {why}"
        what = "" if len(self._input) >= len(c.OPTS_MAGIC) or self._skip else " opts magic"
        return f"Failed to read{what}: {why}"

    def receive(self, data: bytes) -> None:
        """Take what arrived, in any pieces.

        A list may be many times longer than the option that asks for it: with ``has_more`` set, send the output,
        then go on with no data.
        """
        if self._skip:
            taken = min(self._skip, len(data))
            self._skip -= taken
            data = data[taken:]
        self._input += data
        self.has_more = False
        while not self.is_over and not self._skip:
            if len(self._output) >= MAX_OUTPUT:
                self.has_more = True
                return
            if not self._step():
                return

    def _take(self, count: int) -> bytes | None:
        if len(self._input) < count:
            return None
        taken = bytes(self._input[:count])
        del self._input[:count]
        return taken

    def _fail(self, why: str) -> bool:
        self.failure = why
        return False

    # -- steps ------------------------------------------------------------------------------------------------

    def _client_flags(self) -> bool:
        data = self._take(4)
        if data is None:
            return False
        flags = int.from_bytes(data, "big")
        if flags & ~(c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES):
            return self._fail(f"Unknown client flags 0x{flags:x} received")
        self._no_zeroes = bool(flags & c.FLAG_NO_ZEROES)
        self._is_fixed = bool(flags & c.FLAG_FIXED_NEWSTYLE)
        self._step = self._option
        return True

    def _option(self) -> bool:
        if len(self._input) < _OPTION.size:
            return False
        magic, option, length = _OPTION.unpack_from(self._input)
        if magic != c.OPTS_MAGIC:
            return self._fail("Bad magic received")
        if length > c.MAX_OPTION:
            return self._fail(f"len ({length}) is larger than max len ({c.MAX_OPTION})")
        if not self._is_fixed and option != c.OPT_EXPORT_NAME:
            # A client of the unfixed protocol cannot read a reply that says no.
            return self._fail(f"Unsupported option {option} ({c.OPTION_NAMES.get(option, '<unknown>')})")
        known = _OPTIONS.get(option)
        if option == c.OPT_EXPORT_NAME and length > c.MAX_STRING:
            return self._fail("Bad length received")
        limit = known[1] if known is not None else 0
        if length > limit:
            self._refuse_unread(option, length, known is not None)
            return True
        if len(self._input) < _OPTION.size + length:
            return False
        del self._input[: _OPTION.size]
        payload = self._take(length)
        assert payload is not None
        assert known is not None or not length
        if known is None:
            self._unsupported(option)
        else:
            try:
                known[0](self, payload)
            except _BadOption as bad:
                self._reply(option, c.REP_ERR_INVALID, str(bad))
        return True

    def _refuse_unread(self, option: int, length: int, is_known: bool) -> None:
        del self._input[: _OPTION.size]
        taken = min(length, len(self._input))
        del self._input[:taken]
        self._skip = length - taken
        if not is_known:
            self._unsupported(option)
        elif not _OPTIONS[option][1]:
            name = c.OPTION_NAMES[option]
            self._reply(option, c.REP_ERR_INVALID, f"option '{name}' has unexpected length")
        else:
            self._reply(option, c.REP_ERR_TOO_BIG, f"option '{c.OPTION_NAMES[option]}' is too long")

    def _reply(self, option: int, kind: int, payload: bytes | str = b"") -> None:
        data = modified_utf8.encode(payload)[: c.MAX_STRING] if isinstance(payload, str) else payload
        self._output += _REPLY.pack(c.REPLY_MAGIC, option, kind, len(data)) + data

    # -- options ----------------------------------------------------------------------------------------------

    def _unsupported(self, option: int) -> None:
        name = c.OPTION_NAMES.get(option, "<unknown>")
        self._reply(option, c.REP_ERR_UNSUP, f"Unsupported option {option} ({name})")

    def _export_name(self, payload: bytes) -> None:
        if self.extended:
            self._fail("client requested NBD_OPT_EXPORT_NAME after extended headers")
            return
        export = self._exports.lookup(payload.decode("utf-8", "surrogateescape"))
        if export is None:
            self._fail("export not found")
            return
        self._output += struct.pack(">QH", export.size, self._flags(export))
        if not self._no_zeroes:
            self._output += bytes(124)
        self._finish(export)

    def _abort(self, payload: bytes) -> None:
        self._reply(c.OPT_ABORT, c.REP_ACK)
        self._fail("")

    def _list(self, payload: bytes) -> None:
        for export in self._exports.list():
            name = modified_utf8.encode(export.name)
            self._reply(
                c.OPT_LIST,
                c.REP_SERVER,
                struct.pack(">I", len(name)) + name + modified_utf8.encode(export.description),
            )
        self._reply(c.OPT_LIST, c.REP_ACK)

    def _starttls(self, payload: bytes) -> None:
        self._reply(c.OPT_STARTTLS, c.REP_ERR_POLICY, "TLS not configured")

    def _structured_reply(self, payload: bytes) -> None:
        option = c.OPT_STRUCTURED_REPLY
        if self.extended:
            self._reply(option, c.REP_ERR_EXT_HEADER_REQD, "extended headers already negotiated")
        elif self.structured:
            self._reply(option, c.REP_ERR_INVALID, "structured reply already negotiated")
        else:
            self.structured = True
            self._reply(option, c.REP_ACK)

    def _extended_headers(self, payload: bytes) -> None:
        option = c.OPT_EXTENDED_HEADERS
        if self.extended:
            self._reply(option, c.REP_ERR_INVALID, "extended headers already negotiated")
        else:
            self.extended = True
            self.structured = True
            self._reply(option, c.REP_ACK)

    def _info(self, payload: bytes) -> None:
        self._info_or_go(c.OPT_INFO, payload)

    def _go(self, payload: bytes) -> None:
        self._info_or_go(c.OPT_GO, payload)

    def _info_or_go(self, option: int, payload: bytes) -> None:
        reader = _Reader(option, payload)
        name = reader.name()
        wanted = set(reader.numbers(">H", reader.number(">H")))
        reader.end()
        export = self._exports.lookup(name)
        if export is None:
            self._reply(option, c.REP_ERR_UNKNOWN, f"export '{_shortened(name)}' not present")
            return
        if c.INFO_NAME in wanted:
            self._reply(option, c.REP_INFO, struct.pack(">H", c.INFO_NAME) + modified_utf8.encode(export.name))
        if export.description:
            self._reply(
                option, c.REP_INFO, struct.pack(">H", c.INFO_DESCRIPTION) + modified_utf8.encode(export.description)
            )
        asked = c.INFO_BLOCK_SIZE in wanted
        minimum = export.min_block if asked else 1
        preferred = max(4096, minimum, export.preferred_block)
        self._reply(
            option,
            c.REP_INFO,
            struct.pack(">HIII", c.INFO_BLOCK_SIZE, minimum, preferred, export.max_block),
        )
        flags = self._flags(export)
        if option == c.OPT_INFO and self.extended:
            # Contexts may still be chosen. With GO the flag says that there are some to ask for.
            flags |= c.FLAG_BLOCK_STAT_PAYLOAD
        self._reply(option, c.REP_INFO, struct.pack(">HQH", c.INFO_EXPORT, export.size, flags))
        if option == c.OPT_INFO and not asked and export.min_block >= 4096:
            self._reply(
                option,
                c.REP_ERR_BLOCK_SIZE_REQD,
                "request NBD_INFO_BLOCK_SIZE to use this export",
            )
            return
        self._reply(option, c.REP_ACK)
        if option == c.OPT_GO:
            self._finish(export)

    def _list_meta_context(self, payload: bytes) -> None:
        self._meta_context(c.OPT_LIST_META_CONTEXT, payload)

    def _set_meta_context(self, payload: bytes) -> None:
        self._meta_context(c.OPT_SET_META_CONTEXT, payload)

    def _meta_context(self, option: int, payload: bytes) -> None:
        is_set = option == c.OPT_SET_META_CONTEXT
        if is_set and not self.structured:
            text = f"request option '{c.OPTION_NAMES[option]}' when structured reply is not negotiated"
            self._reply(option, c.REP_ERR_INVALID, text)
            return
        if is_set:
            self._contexts, self._contexts_for = (), None
        reader = _Reader(option, payload)
        name = reader.name()
        export = self._exports.lookup(name)
        if export is None:
            self._reply(option, c.REP_ERR_UNKNOWN, f"export '{_shortened(name)}' not present")
            return
        chosen = _selected(export.contexts, reader.queries(), is_list=not is_set)
        for number, context in chosen:
            identifier = number if is_set else 0
            self._reply(option, c.REP_META_CONTEXT, struct.pack(">I", identifier) + modified_utf8.encode(context))
        self._reply(option, c.REP_ACK)
        if is_set:
            self._contexts = chosen
            self._contexts_for = export.name

    # -- the end ----------------------------------------------------------------------------------------------

    def _flags(self, export: ExportInfo) -> int:
        flags = c.FLAG_HAS_FLAGS | c.FLAG_SEND_FLUSH | c.FLAG_SEND_FUA | c.FLAG_SEND_CACHE
        if export.read_only:
            flags |= c.FLAG_READ_ONLY
        else:
            flags |= c.FLAG_SEND_TRIM | c.FLAG_SEND_WRITE_ZEROES | c.FLAG_SEND_FAST_ZERO
        if export.multi_conn:
            flags |= c.FLAG_CAN_MULTI_CONN
        if self.structured:
            flags |= c.FLAG_SEND_DF
        if self.extended and self._contexts and self._contexts_for == export.name:
            flags |= c.FLAG_BLOCK_STAT_PAYLOAD
        return flags

    def _finish(self, export: ExportInfo) -> None:
        contexts = self._contexts if self._contexts_for == export.name else ()
        leftover, self._input = bytes(self._input), bytearray()
        self.result = Negotiated(export, self.structured, self.extended, contexts, leftover)


_Handler = Callable[[ServerHandshake, bytes], None]

# The law of the negotiation: option -> what serves it, and the longest payload it is given.
_OPTIONS: dict[int, tuple[_Handler, int]] = {
    c.OPT_EXPORT_NAME: (ServerHandshake._export_name, c.MAX_STRING),
    c.OPT_ABORT: (ServerHandshake._abort, c.MAX_STRING),
    c.OPT_LIST: (ServerHandshake._list, 0),
    c.OPT_STARTTLS: (ServerHandshake._starttls, 0),
    c.OPT_INFO: (ServerHandshake._info, MAX_OPTION_READ),
    c.OPT_GO: (ServerHandshake._go, MAX_OPTION_READ),
    c.OPT_STRUCTURED_REPLY: (ServerHandshake._structured_reply, 0),
    c.OPT_EXTENDED_HEADERS: (ServerHandshake._extended_headers, 0),
    c.OPT_LIST_META_CONTEXT: (ServerHandshake._list_meta_context, MAX_OPTION_READ),
    c.OPT_SET_META_CONTEXT: (ServerHandshake._set_meta_context, MAX_OPTION_READ),
}


_NAMESPACES = ("base:", "qemu:", DIRTY_BITMAP)


def _selected(
    contexts: Sequence[tuple[int, str]], queries: Sequence[str], *, is_list: bool
) -> tuple[tuple[int, str], ...]:
    """The contexts that are asked for: by name, or when listing by namespace; a list of everything by no query."""
    if is_list and not queries:
        return tuple(contexts)
    wanted = set(queries)
    namespaces = tuple(wanted.intersection(_NAMESPACES)) if is_list else ()
    chosen = []
    for number, context in contexts:
        if context in wanted:
            wanted.remove(context)
            chosen.append((number, context))
        elif namespaces and context.startswith(namespaces):
            chosen.append((number, context))
    return tuple(chosen)


class _BadOption(Exception):
    """An option's payload is not what it should be; the text says why."""


class _Reader:
    """Reads an option's payload. Raises _BadOption."""

    def __init__(self, option: int, data: bytes) -> None:
        self._option = c.OPTION_NAMES[option]
        self._data = data

    def number(self, layout: str) -> int:
        size = struct.calcsize(layout)
        (value,) = struct.unpack(layout, self._take(size))
        return int(value)

    def numbers(self, layout: str, count: int) -> list[int]:
        return [number for (number,) in struct.iter_unpack(layout, self._take(count * struct.calcsize(layout)))]

    def name(self) -> str:
        length = self.number(">I")
        if length > c.MAX_STRING:
            raise _BadOption(f"Invalid name length: {length}")
        return self._text(length)

    def queries(self) -> list[str]:
        """What follows them is nobody's business."""
        count = self.number(">I")
        if count * 4 > len(self._data):
            raise _BadOption(self._inconsistent)
        return [self._query() for _ in range(count)]

    def _query(self) -> str:
        length = self.number(">I")
        if length > c.MAX_STRING:
            self._take(length)
            return ""  # no context has such a name
        return self._text(length)

    def _text(self, length: int) -> str:
        value = self._take(length)
        if b"\0" in value:
            raise _BadOption(f"Unexpected embedded NUL in option {self._option}")
        return value.decode("utf-8", "surrogateescape")

    def end(self) -> None:
        if self._data:
            raise _BadOption(f"option '{self._option}' has unexpected length")

    def _take(self, size: int) -> bytes:
        if size > len(self._data):
            raise _BadOption(self._inconsistent)
        taken, self._data = self._data[:size], self._data[size:]
        return taken

    @property
    def _inconsistent(self) -> str:
        return f"Inconsistent lengths in option {self._option}"


def _shortened(name: str) -> str:
    """A name of the client's as it is shown to it."""
    data = modified_utf8.encode(name)
    return name if len(data) < SHOWN else data[:SHOWN].decode("utf-8", "ignore") + "..."
