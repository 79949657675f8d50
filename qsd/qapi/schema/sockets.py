"""Socket addresses, in the flat form (``{"type": "unix", "path": ...}``) and the legacy ``{"type", "data"}`` one.

Whichever form an address came in, ``isinstance(x, InetSocketAddress)`` and friends say what it is: the flat form's
values inherit from them, the legacy form holds one in ``data``.
"""

from __future__ import annotations

from enum import Enum

from qsd.qapi.core import Uint16, Uint32, branch, enum, legacy_union, struct, union


@enum("SocketAddressType")
class SocketAddressType(str, Enum):
    INET = "inet"
    UNIX = "unix"
    VSOCK = "vsock"
    FD = "fd"


@struct("InetSocketAddress")
class InetSocketAddress:
    """``to`` is the last port to try; the keep-alive times are in seconds."""

    host: str
    port: str
    numeric: bool | None = None
    to: Uint16 | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    keep_alive: bool | None = None
    keep_alive_count: Uint32 | None = None
    keep_alive_idle: Uint32 | None = None
    keep_alive_interval: Uint32 | None = None
    mptcp: bool | None = None


@struct("UnixSocketAddress")
class UnixSocketAddress:
    path: str
    abstract: bool | None = None
    tight: bool | None = None


@struct("VsockSocketAddress")
class VsockSocketAddress:
    cid: str
    port: str


@struct("FdSocketAddress")
class FdSocketAddress:
    str: str


@union("SocketAddress", tag="type")
class SocketAddress:
    type: SocketAddressType


@branch(SocketAddress, SocketAddressType.INET, name="InetSocketAddress")
class SocketAddressInet(SocketAddress, InetSocketAddress):
    pass


@branch(SocketAddress, SocketAddressType.UNIX, name="UnixSocketAddress")
class SocketAddressUnix(SocketAddress, UnixSocketAddress):
    pass


@branch(SocketAddress, SocketAddressType.VSOCK, name="VsockSocketAddress")
class SocketAddressVsock(SocketAddress, VsockSocketAddress):
    pass


@branch(SocketAddress, SocketAddressType.FD, name="FdSocketAddress")
class SocketAddressFd(SocketAddress, FdSocketAddress):
    pass


AnySocketAddress = InetSocketAddress | UnixSocketAddress | VsockSocketAddress | FdSocketAddress


@legacy_union(
    "SocketAddressLegacy",
    {
        SocketAddressType.INET: InetSocketAddress,
        SocketAddressType.UNIX: UnixSocketAddress,
        SocketAddressType.VSOCK: VsockSocketAddress,
        SocketAddressType.FD: FdSocketAddress,
    },
)
class SocketAddressLegacy:
    type: SocketAddressType
    data: AnySocketAddress


def plain_address(address: SocketAddress | SocketAddressLegacy) -> AnySocketAddress:
    """Give the address itself, whichever form it came in."""
    if isinstance(address, SocketAddressLegacy):
        return address.data
    assert isinstance(address, (InetSocketAddress, UnixSocketAddress, VsockSocketAddress, FdSocketAddress))
    return address
