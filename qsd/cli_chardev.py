"""The ``--chardev`` option: its flat syntax becomes what ``chardev-add`` takes, a ``ChardevBackend``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from qsd.errors import QmpError
from qsd.qapi.schema import chardev as schema
from qsd.qapi.schema.chardev import ChardevBackend, ChardevBackendKind
from qsd.qapi.schema.chardev_options import CHARDEV_OPTIONS
from qsd.qapi.schema.sockets import (
    AnySocketAddress,
    FdSocketAddress,
    InetSocketAddress,
    SocketAddressLegacy,
    SocketAddressType,
    UnixSocketAddress,
)
from qsd.wire.qemuopts import QemuOpts, parse


@attrs.frozen
class Help:
    """Help was asked for: what to print, and the exit code (the reference's, odd as it is)."""

    text: str
    code: int


@attrs.frozen
class NewChardev:
    """A chardev to make."""

    id: str
    backend: ChardevBackend


def read(text: str, warn: Callable[[str], None]) -> NewChardev | Help:
    """Read an option's argument. Raises QmpError in the reference's words."""
    given = parse(text, CHARDEV_OPTIONS, warn)
    kind = given.text("backend")
    if given.wants_help:
        return Help("chardev options:\n" + CHARDEV_OPTIONS.help(), 1)
    if kind in ("help", "?"):
        names = "".join(f"  {item.value}\n" for item in ChardevBackendKind)
        return Help("Available chardev backend types: \n" + names, 0)
    if given.id is None:
        raise QmpError("chardev: no id specified")
    if kind is None:
        raise QmpError(f'chardev: "{given.id}" missing backend')
    if kind not in _BACKENDS:
        raise QmpError(f"'{kind}' is not a valid char driver name")
    make = _BACKENDS[kind]
    return NewChardev(given.id, ChardevBackend(type=ChardevBackendKind(kind), data=make(given)))


def _common(given: QemuOpts) -> dict[str, Any]:
    return {
        "logfile": given.text("logfile"),
        "logappend": given.flag("logappend"),
        "logtimestamp": given.flag("logtimestamp"),
    }


def _file(given: QemuOpts) -> schema.ChardevFile:
    path = given.text("path")
    if path is None:
        raise QmpError("chardev: file: no filename given")
    return schema.ChardevFile(**_common(given), in_=given.text("input-path"), out=path, append=given.flag("append"))


def _pipe(given: QemuOpts) -> schema.ChardevHostdev:
    path = given.text("path")
    if path is None:
        raise QmpError("chardev: pipe: no device path given")
    return schema.ChardevHostdev(**_common(given), device=path)


def _socket(given: QemuOpts) -> schema.ChardevSocket:
    server = given.flag("server") or False
    wait = given.flag("wait")
    if wait is None and server:
        wait = True  # the command line waits for the first client unless told otherwise
    return schema.ChardevSocket(
        **_common(given),
        addr=_legacy(_address(given)),
        tls_creds=given.text("tls-creds"),
        tls_authz=given.text("tls-authz"),
        server=server,
        wait=wait,
        nodelay=given.flag("nodelay"),
        telnet=given.flag("telnet"),
        tn3270=given.flag("tn3270"),
        websocket=given.flag("websocket"),
        reconnect_ms=_signed(given.number("reconnect-ms")),
    )


def _address(given: QemuOpts) -> AnySocketAddress:
    path, host, descriptor = given.text("path"), given.text("host"), given.text("fd")
    if sum(item is not None for item in (path, host, descriptor)) > 1:
        raise QmpError("None or one of 'path', 'fd' or 'host' option required.")
    if path is not None:
        return UnixSocketAddress(path=path, abstract=given.flag("abstract"), tight=given.flag("tight"))
    if host is not None:
        port = given.text("port")
        if port is None:
            raise QmpError("chardev: socket: no port given")
        # The reference keeps the lower 16 bits of ``to``.
        to = given.number("to")
        return InetSocketAddress(
            host=host,
            port=port,
            to=None if to is None else to & 0xFFFF,
            ipv4=given.flag("ipv4"),
            ipv6=given.flag("ipv6"),
        )
    # Without any address the reference takes an empty descriptor number.
    return FdSocketAddress(str=descriptor or "")


def _signed(number: int | None) -> int | None:
    """A number as the 64 bits the reference keeps of it."""
    return None if number is None else (number + (1 << 63)) % (1 << 64) - (1 << 63)


_ADDRESS_TYPES: dict[type, SocketAddressType] = {
    UnixSocketAddress: SocketAddressType.UNIX,
    InetSocketAddress: SocketAddressType.INET,
    FdSocketAddress: SocketAddressType.FD,
}


def _legacy(address: AnySocketAddress) -> SocketAddressLegacy:
    return SocketAddressLegacy(type=_ADDRESS_TYPES[type(address)], data=address)


_BACKENDS: dict[str, Callable[[QemuOpts], Any]] = {
    "file": _file,
    "pipe": _pipe,
    "socket": _socket,
    "pty": lambda given: schema.ChardevPty(**_common(given), path=given.text("path")),
    "null": lambda given: schema.ChardevCommon(**_common(given)),
    "stdio": lambda given: schema.ChardevStdio(**_common(given), signal=given.flag("signal")),
    "ringbuf": lambda given: schema.ChardevRingbuf(**_common(given), size=given.size("size")),
    "memory": lambda given: schema.ChardevRingbuf(**_common(given), size=given.size("size")),
}
