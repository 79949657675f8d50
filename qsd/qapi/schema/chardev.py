"""Character devices: their backends and the commands that make, list, feed and remove them."""

from __future__ import annotations

from enum import Enum

from qsd.qapi.core import SCHEMA, Command, enum, legacy_union, struct
from qsd.qapi.schema.sockets import SocketAddressLegacy


@enum("ChardevBackendKind", features={"memory": ("deprecated",)})
class ChardevBackendKind(str, Enum):
    FILE = "file"
    PIPE = "pipe"
    SOCKET = "socket"
    PTY = "pty"
    NULL = "null"
    STDIO = "stdio"
    RINGBUF = "ringbuf"
    MEMORY = "memory"


@struct("ChardevCommon")
class ChardevCommon:
    logfile: str | None = None
    logappend: bool | None = None
    logtimestamp: bool | None = None


@struct("ChardevFile")
class ChardevFile(ChardevCommon):
    in_: str | None = None
    out: str
    append: bool | None = None


@struct("ChardevHostdev")
class ChardevHostdev(ChardevCommon):
    device: str


@struct("ChardevSocket")
class ChardevSocket(ChardevCommon):
    """``server`` is true and ``wait`` false when absent; ``reconnect_ms`` in milliseconds, 0 for never."""

    addr: SocketAddressLegacy
    tls_creds: str | None = None
    tls_authz: str | None = None
    server: bool | None = None
    wait: bool | None = None
    nodelay: bool | None = None
    telnet: bool | None = None
    tn3270: bool | None = None
    websocket: bool | None = None
    reconnect_ms: int | None = None


@struct("ChardevPty")
class ChardevPty(ChardevCommon):
    path: str | None = None


@struct("ChardevStdio")
class ChardevStdio(ChardevCommon):
    signal: bool | None = None


@struct("ChardevRingbuf")
class ChardevRingbuf(ChardevCommon):
    """``size`` in bytes, a power of two (default 64 KiB)."""

    size: int | None = None


AnyChardev = (
    ChardevCommon | ChardevFile | ChardevHostdev | ChardevSocket | ChardevPty | ChardevStdio | ChardevRingbuf
)


@legacy_union(
    "ChardevBackend",
    {
        ChardevBackendKind.FILE: ChardevFile,
        ChardevBackendKind.PIPE: ChardevHostdev,
        ChardevBackendKind.SOCKET: ChardevSocket,
        ChardevBackendKind.PTY: ChardevPty,
        ChardevBackendKind.NULL: ChardevCommon,
        ChardevBackendKind.STDIO: ChardevStdio,
        ChardevBackendKind.RINGBUF: ChardevRingbuf,
        ChardevBackendKind.MEMORY: ChardevRingbuf,
    },
)
class ChardevBackend:
    type: ChardevBackendKind
    data: AnyChardev


@struct("ChardevInfo")
class ChardevInfo:
    label: str
    filename: str
    frontend_open: bool


@struct("ChardevBackendInfo")
class ChardevBackendInfo:
    name: str


@struct("ChardevReturn")
class ChardevReturn:
    pty: str | None = None


@struct("chardev-add-arg")
class ChardevAddArgs:
    id: str
    backend: ChardevBackend


@struct("chardev-remove-arg")
class ChardevRemoveArgs:
    id: str


@enum("DataFormat")
class DataFormat(str, Enum):
    UTF8 = "utf8"
    BASE64 = "base64"


@struct("ringbuf-write-arg")
class RingbufWriteArgs:
    device: str
    data: str
    format: DataFormat | None = None


@struct("ringbuf-read-arg")
class RingbufReadArgs:
    device: str
    size: int
    format: DataFormat | None = None


SCHEMA.declare(
    Command("query-chardev", returns=tuple[ChardevInfo, ...]),
    Command("query-chardev-backends", returns=tuple[ChardevBackendInfo, ...]),
    Command("ringbuf-write", args=RingbufWriteArgs),
    Command("ringbuf-read", args=RingbufReadArgs, returns=str),
    Command("chardev-add", args=ChardevAddArgs, returns=ChardevReturn),
    Command("chardev-remove", args=ChardevRemoveArgs),
)
