"""How socket chardevs are called in ``query-chardev``: the reference's texts."""

from __future__ import annotations

import os
import socket
from typing import Any

from qsd.qapi.schema.sockets import (
    AnySocketAddress,
    FdSocketAddress,
    InetSocketAddress,
    UnixSocketAddress,
    VsockSocketAddress,
)


def disconnected(address: AnySocketAddress, protocol: str, *, is_server: bool) -> str:
    """The name while no peer is there. ``protocol`` is what TCP is called (``tcp``, ``telnet``)."""
    return f"disconnected:{_address(address, protocol)}{_server(is_server)}"


def connected(sock: socket.socket, protocol: str, *, is_server: bool) -> str:
    """The name while ``sock`` is connected."""
    try:
        local, peer = sock.getsockname(), sock.getpeername()
    except OSError:
        return "unknown"
    if sock.family == socket.AF_UNIX:
        return f"unix:{_unix(local or peer)}{_server(is_server)}"
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        return f"{protocol}:{_inet(local)}{_server(is_server)} <-> {_inet(peer)}"
    return "unknown"


def own_address(sock: socket.socket) -> AnySocketAddress | None:
    """The address an inherited listening socket has; None for families without one here."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        is_abstract = isinstance(name, bytes)
        return UnixSocketAddress(path=_plain(name), abstract=is_abstract or None, tight=is_abstract or None)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        return InetSocketAddress(host=name[0], port=str(name[1]))
    return None


def _server(is_server: bool) -> str:
    return ",server=on" if is_server else ""


def _plain(name: str | bytes) -> str:
    return os.fsdecode(name[1:].rstrip(b"\0")) if isinstance(name, bytes) else name


def _unix(name: str | bytes) -> str:
    if not isinstance(name, bytes) or not name:
        return _plain(name)
    tight = "" if len(name) == 108 and name.endswith(b"\0") else ",tight=on"
    return f"{_plain(name)},abstract=on{tight}"


def _inet(name: Any) -> str:
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"{host}:{name[1]}"


def _address(address: AnySocketAddress, protocol: str) -> str:
    if isinstance(address, UnixSocketAddress):
        text = f"unix:{address.path}"
        if address.abstract:
            text += ",abstract=on" + ("" if address.tight is False else ",tight=on")
        return text
    if isinstance(address, InetSocketAddress):
        return f"{protocol}:{address.host}:{address.port}"
    if isinstance(address, VsockSocketAddress):
        return f"vsock:{address.cid}:{address.port}"
    assert isinstance(address, FdSocketAddress)
    return f"fd:{address.str}"
