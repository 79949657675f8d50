"""Conversations over NBD: every option of the negotiation, every request, right and wrong."""

from __future__ import annotations

import struct

from nbd_talk import Step

# What both daemons export.
ARGUMENTS = (
    *("--blockdev", "file,node-name=f,filename=img,discard=unmap"),
    *("--blockdev", "null-co,node-name=z,size=1048576,read-zeroes=on"),
    *("--blockdev", "null-co,node-name=big,size=9223372035781033984,read-zeroes=on"),
    *("--nbd-server", "addr.type=unix,addr.path=n"),
    *("--export", "nbd,id=d,node-name=f,name=d,writable=on,allocation-depth=on"),
    *("--export", "nbd,id=r,node-name=f,name=r,description=only to read"),
    *("--export", "nbd,id=z,node-name=z,name=z,writable=on"),
    *("--export", "nbd,id=big,node-name=big,name=big,writable=on,allocation-depth=on"),
    *("--export", "nbd,id=e,node-name=z,name="),
)
SIZE = 1 << 20


def string(text: str) -> bytes:
    return struct.pack(">I", len(text.encode())) + text.encode()


def opt(number: int, payload: bytes = b"") -> Step:
    return ("opt", number, payload.hex())


def info(name: str, *wanted: int, number: int = 6) -> Step:
    return opt(number, string(name) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted))


def go(name: str, *wanted: int) -> Step:
    return info(name, *wanted, number=7)


def meta(number: int, name: str, *queries: str) -> Step:
    return opt(number, string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries)))


def req(kind: int, offset: int, length: int, flags: int = 0, payload: bytes = b"") -> Step:
    return ("req", kind, offset, length, flags, payload.hex())


ABORT, LIST, STARTTLS, STRUCTURED, EXTENDED = opt(2), opt(3), opt(5), opt(8), opt(11)
LIST_META, SET_META = 9, 10
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, ONE, FAST, PAYLOAD = (1 << bit for bit in range(6))
LEAVE: Step = ("raw", "")

_NEGOTIATION = {
    "flags 0": [("flags", 0), LIST, ABORT],
    "flags 1": [("flags", 1), LIST, ABORT],
    "flags 4": [("flags", 4), LIST],
    "flags 0x80000003": [("flags", 0x80000003), LIST],
    "name": [("name", "d"), req(READ, 0, 8), LEAVE],
    "name, with zeroes": [("flags", 1), ("name", "r"), req(READ, 0, 8), LEAVE],
    "name, empty": [("name", ""), req(READ, 0, 8), LEAVE],
    "name, unknown": [("name", "nope"), LEAVE],
    "name, structured": [STRUCTURED, ("name", "d"), req(READ, 0, 8), LEAVE],
    "name, extended": [EXTENDED, ("name", "d"), LEAVE],
    "abort": [ABORT, LIST],
    "abort with payload": [opt(2, b"why"), LIST],
    "list": [LIST, opt(3, b"x"), LIST, ABORT],
    "starttls": [STARTTLS, LIST, ABORT],
    "starttls with payload": [opt(5, b"x"), LIST],
    "unknown": [opt(0), opt(4), opt(12, b"abc"), opt(99, bytes(5000)), opt(1 << 31), LIST, ABORT],
    "info": [
        *(info(name, *wanted) for name in ("d", "r", "z", "") for wanted in ((), (3,), (0, 1, 2, 3), (1, 1, 9))),
        *(info("a\nb"), info("x" * 79), info("x" * 80), info("x" * 81), info("a\0b"), info("é" * 50)),
        *(info("nope"), opt(6), opt(6, b"\0"), opt(6, b"\0\0\0\1d"), opt(6, string("d") + b"\0")),
        *(opt(6, string("d") + b"\0\1"), opt(6, string("d") + b"\0\1\0\3x"), opt(6, string("d") + b"\0\0x")),
        *(opt(6, struct.pack(">I", 1 << 31) + b"xx"), opt(6, struct.pack(">I", 4097) + bytes(4099))),
        *(opt(6, string("x" * 4096) + b"\0\0"), opt(6, string("é") + b"\0\0"), info("big", 3)),
        ABORT,
    ],
    "go": [go("nope"), opt(7), opt(7, b"\0\0\0\2d\0\0"), go("r", 1, 2, 3), req(READ, 0, 4), LEAVE],
    "info, extended": [
        *(EXTENDED, info("d"), info("r", 3), meta(LIST_META, "r"), info("r")),
        *(meta(SET_META, "r", "base:allocation"), info("d"), info("r"), meta(SET_META, "r"), info("r"), go("r")),
        LEAVE,
    ],
    "go, extended, with contexts": [EXTENDED, meta(SET_META, "d", "base:allocation"), go("d"), LEAVE],
    "structured": [STRUCTURED, STRUCTURED, opt(8, b"x"), EXTENDED, STRUCTURED, ABORT],
    "extended": [opt(11, b"x"), EXTENDED, EXTENDED, STRUCTURED, ABORT],
    "contexts too early": [meta(LIST_META, "d"), meta(SET_META, "d", "base:allocation"), ABORT],
    "contexts listed": [
        STRUCTURED,
        *(
            meta(LIST_META, "d", *queries)
            for queries in (
                (),
                ("base:",),
                ("qemu:",),
                ("base:allocation",),
                ("qemu:allocation-depth",),
                ("qemu:dirty-bitmap:",),
                ("qemu:dirty-bitmap:x",),
                ("base:", "qemu:"),
                ("base:allocation", "base:allocation"),
                ("base:x",),
                ("base",),
                ("",),
                (":",),
                ("x" * 4096,),
                ("é:",),
            )
        ),
        *(meta(LIST_META, name) for name in ("r", "nope", "", "x" * 100, "a\0b")),
        *(meta(LIST_META, "d", query) for query in ("base:allocation\0", "base:allocatio\0n")),
        *(opt(LIST_META), opt(LIST_META, string("d")), opt(LIST_META, string("d") + b"\0\0\0\1")),
        ABORT,
    ],
    "contexts, a query longer than its option": [
        STRUCTURED,
        opt(LIST_META, string("d") + b"\0\0\0\1\0\0\0\5abc"),
        ABORT,
    ],
    "contexts, a query longer than any": [
        STRUCTURED,
        opt(SET_META, string("d") + b"\0\0\0\1" + struct.pack(">I", 5000) + bytes(5000)),
        ABORT,
    ],
    "contexts chosen": [
        STRUCTURED,
        *(
            meta(SET_META, "d", *queries)
            for queries in (
                (),
                ("base:",),
                ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:x"),
                ("qemu:allocation-depth", "base:allocation"),
                ("nope",),
                ("base:allocation",),
            )
        ),
        *(meta(SET_META, "r", "qemu:allocation-depth"), meta(SET_META, "nope", "base:allocation")),
        go("d"),
        req(STATUS, 0, 512),  # the last choice failed
        LEAVE,
    ],
    "contexts of another export": [
        STRUCTURED,
        meta(SET_META, "r", "base:allocation"),
        go("d"),
        req(STATUS, 0, 512),
        LEAVE,
    ],
    "bad magic": [("raw", "00000003" + b"IHAVENOT".hex() + "0000000300000000")],
    "length beyond all": [("raw", "00000003" + b"IHAVEOPT".hex() + "00000003ffffffff")],
    "half an option": [("raw", "00000003" + b"IHAVEOPT".hex() + "0000")],
    "name too long": [("raw", "00000003" + b"IHAVEOPT".hex() + "0000000100001001" + "78" * 4097)],
}


def _requests() -> list[Step]:
    """Every kind of request, well and badly made."""
    end = SIZE
    return [
        req(READ, 0, 4096),
        *(req(READ, offset, length) for offset, length in ((1, 1), (end - 1, 1), (end - 1, 2), (end, 1), (0, 0))),
        *(req(READ, end, 0), req(READ, (1 << 64) - 1, 1), req(READ, (1 << 64) - 1, 2), req(READ, 1 << 63, 512)),
        *(req(READ, 0, 512, flags) for flags in (FUA, NO_HOLE, DF, ONE, FAST, 1 << 15)),
        req(READ, 0, (32 << 20) + 1),
        req(WRITE, 0, 4, 0, b"abcd"),
        req(WRITE, 1000, 3, FUA, b"xyz"),
        req(READ, 0, 4),
        req(READ, 999, 6),
        *(req(WRITE, offset, 2, 0, b"??") for offset in (end - 1, end, (1 << 64) - 1)),
        *(req(WRITE, 4096, 2, flags, b"!!") for flags in (NO_HOLE, DF, ONE, FAST, 1 << 15)),
        *(req(WRITE, offset, 0) for offset in (0, end)),
        req(READ, 4096, 2),
        *(req(FLUSH, 0, 0, flags) for flags in (0, FUA, DF)),
        *(req(FLUSH, offset, length) for offset, length in ((0, 1), (1, 0), (end, end))),
        *(req(ZEROES, 512, 1024, flags) for flags in (0, FUA, NO_HOLE, FUA | NO_HOLE, DF, ONE, 1 << 15)),
        *(req(ZEROES, offset, length) for offset, length in ((end - 1, 2), (end, 0), (0, 0), (1 << 63, 1))),
        req(ZEROES, 0, 1 << 31),
        req(READ, 0, 2048),
        *(req(TRIM, 65536, 65536, flags) for flags in (0, FUA, NO_HOLE, DF)),
        *(req(TRIM, offset, length) for offset, length in ((end - 1, 2), (end, 0), (0, 0), (0, 0xFFFFFFFF))),
        *(req(CACHE, 0, length, flags) for length, flags in ((4096, 0), (0, 0), (4096, FUA), (end + 1, 0))),
        req(CACHE, 0, 0xFFFFFFFF),
        *(req(STATUS, 0, 512), req(STATUS, 0, 512, ONE)),
        *(req(kind, 0, 512) for kind in (8, 9, 255, 65535)),
        req(READ, 0, 16),
        req(DISC, 0, 0),
    ]


def _status() -> list[Step]:
    end = SIZE
    return [
        *(req(STATUS, offset, length) for offset, length in ((0, end), (0, 1), (512, 1024), (end - 1, 1))),
        *(req(STATUS, 0, end, flags) for flags in (ONE, FUA, DF, NO_HOLE)),
        *(req(STATUS, offset, length) for offset, length in ((0, 0), (end, 1), (end - 1, 2), (0, 0xFFFFFFFF))),
        req(READ, 0, 4),
        req(DISC, 7, 7, FUA),
    ]


_BOTH = ("base:allocation", "qemu:allocation-depth")
_TRANSMISSION = {
    "simple": [go("d"), *_requests()],
    "structured requests": [STRUCTURED, go("d"), *_requests()],
    "extended requests": [EXTENDED, go("d"), *_requests()],
    "zeroes": [go("z"), *_requests()],
    "zeroes, structured": [STRUCTURED, go("z"), *_requests()],
    "zeroes, extended": [EXTENDED, go("z"), *_requests()],
    "read-only": [STRUCTURED, go("r"), *_requests()],
    "read-only, extended": [EXTENDED, go("r"), *_requests()],
    "status": [STRUCTURED, meta(SET_META, "d", *_BOTH), go("d"), *_status()],
    "status, one context": [STRUCTURED, meta(SET_META, "d", _BOTH[0]), go("d"), *_status()],
    "status, extended": [EXTENDED, meta(SET_META, "d", *_BOTH), go("d"), *_status()],
    "status of zeroes": [STRUCTURED, meta(SET_META, "z", _BOTH[0]), go("z"), *_status()],
    "status with payload": [
        EXTENDED,
        meta(SET_META, "d", *_BOTH),
        go("d"),
        *(
            req(STATUS, 0, len(payload), PAYLOAD, payload)
            for payload in (
                struct.pack(">QI", SIZE, 0),
                struct.pack(">QI", SIZE, 1),
                struct.pack(">QII", SIZE, 1, 0),
                struct.pack(">QII", 512, 7, 7),
                struct.pack(">QI", 0, 0),
                struct.pack(">Q", 512),
                b"",
                bytes(13),
            )
        ),
        req(READ, 0, 4),
        LEAVE,
    ],
    "64 bits": [
        EXTENDED,
        meta(SET_META, "big", *_BOTH),
        go("big", 3),
        *(req(STATUS, 0, length) for length in (1 << 32, 1 << 40, (1 << 63) - (1 << 30))),
        *(req(kind, 1 << 40, 1 << 33) for kind in (TRIM, ZEROES, CACHE)),
        *(req(kind, 0, (1 << 64) - 1) for kind in (READ, TRIM, ZEROES, CACHE, STATUS)),
        req(WRITE, 0, 4, PAYLOAD, b"abcd"),
        req(WRITE, 0, 4, 0, b"abcd"),
        req(FLUSH, 0, 0),
        LEAVE,
    ],
    "bad request magic": [go("d"), ("raw", "deadbeef" + "00" * 24)],
    "compact request among extended ones": [
        EXTENDED,
        go("d"),
        ("raw", "25609513" + "00" * 20 + "00000004" + "00" * 4),
    ],
}

CONVERSATIONS: dict[str, list[Step]] = {**_NEGOTIATION, **_TRANSMISSION}
