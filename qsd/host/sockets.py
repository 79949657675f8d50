"""Sockets from QAPI addresses: listening ones, and connected ones.

Everything returned is non-blocking. Texts are the reference's. A unix path is replaced by ``listen``, as the
reference does, and removed by ``Listener.close``, but only while it is still the socket that was bound there.

Descriptor addresses name an inherited descriptor by number; they mean something only where whoever names the
number also started the process, so callers say with ``may_pass_fds`` whether the address came that way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import socket
import tempfile
from collections.abc import Iterable
from typing import Any

import attrs
import trio

from qsd.errors import QmpError, errno_text
from qsd.qapi.schema.sockets import (
    AnySocketAddress,
    FdSocketAddress,
    InetSocketAddress,
    SocketAddress,
    SocketAddressLegacy,
    UnixSocketAddress,
    VsockSocketAddress,
    plain_address,
)

_SUN_PATH_MAX = 108
_IPPROTO_MPTCP = 262  # socket.IPPROTO_MPTCP exists from Python 3.10 on, but only where it was compiled with it
_NUMBER = re.compile(r"[ \t\n\v\f\r]*[+-]?[0-9]+")
_CONNECT_RETRY_S = 0.01  # a unix listener with a full backlog can only be asked again

Address = SocketAddress | SocketAddressLegacy | AnySocketAddress


@attrs.frozen
class _Owned:
    """A unix socket's place in the file system, as it was when it became ours."""

    path: str
    device: int
    inode: int

    @staticmethod
    def of(path: str) -> _Owned | None:
        try:
            found = os.lstat(path)
        except OSError:
            return None
        # Absolute, because a background daemon changes its working directory after this.
        return _Owned(os.path.abspath(path), found.st_dev, found.st_ino)

    def unlink(self) -> None:
        with contextlib.suppress(OSError):
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == (self.device, self.inode):
                os.unlink(self.path)


@attrs.frozen(eq=False)
class Listener:
    """A listening socket. ``address`` is where it listens now (the port that was found, the path made up)."""

    socket: socket.socket
    address: AnySocketAddress
    _owned: _Owned | None = None

    def close(self) -> None:
        """Stop listening; remove the unix path if it is still this socket. Idempotent."""
        if self.socket.fileno() >= 0:
            self.socket.close()
            if self._owned is not None:
                self._owned.unlink()


async def listen(address: Address, *, backlog: int, may_pass_fds: bool = False) -> list[Listener]:
    """Listen at ``address``: one listener for each address a host name stands for. Raises QmpError.

    An empty host is IPv4 and IPv6; an ``inet`` address with ``to`` takes the first free port up to it.
    """
    plain = _plain(address)
    if isinstance(plain, UnixSocketAddress):
        return [_listen_unix(plain, backlog)]
    if isinstance(plain, InetSocketAddress):
        return await _listen_inet(plain, backlog)
    if isinstance(plain, VsockSocketAddress):
        return [_listen_vsock(plain, backlog)]
    sock = _adopt(plain, may_pass_fds)
    try:
        sock.listen(backlog)
    except OSError as error:
        sock.detach()  # the descriptor stays whose it was
        raise QmpError(f"Failed to listen on fd socket: {_text(error)}") from None
    name = sock.getsockname()
    owned = _Owned.of(name) if sock.family == socket.AF_UNIX and isinstance(name, str) and name else None
    return [Listener(sock, plain, owned)]


def close_listeners(listeners: Iterable[Listener]) -> None:
    """Close all of them."""
    for listener in listeners:
        listener.close()


async def connect(address: Address, *, may_pass_fds: bool = False) -> socket.socket:
    """Connect to ``address`` (a descriptor address is a connected socket already). Raises QmpError."""
    plain = _plain(address)
    if isinstance(plain, UnixSocketAddress):
        # No name at all is, to the kernel, an abstract one that nobody has; Python would make it a bad address.
        path = unix_name(plain) or bytes(_SUN_PATH_MAX)
        return await _connect_first([(socket.AF_UNIX, 0, path)], f"Failed to connect to '{plain.path}'")
    if isinstance(plain, InetSocketAddress):
        proto = _IPPROTO_MPTCP if plain.mptcp else 0
        found = [(family, proto, name) for family, name in await _resolve(plain, passive=False)]
        sock = await _connect_first(found, f"Failed to connect to '{plain.host}:{plain.port}'")
        _set_keep_alive(sock, plain)
        return sock
    if isinstance(plain, VsockSocketAddress):
        name = _vsock_name(plain)
        return await _connect_first(
            [(socket.AF_VSOCK, 0, name)], f"Failed to connect to '{plain.cid}:{plain.port}'"
        )
    return _adopt(plain, may_pass_fds)


def unix_name(address: UnixSocketAddress) -> str | bytes:
    """The kernel's name of a unix address: abstract names start with a NUL, and fill the field unless tight."""
    raw = os.fsencode(address.path)
    limit = _SUN_PATH_MAX - 1  # a NUL stands before an abstract name, and behind a path
    if len(raw) > limit:
        room = limit if address.abstract else _SUN_PATH_MAX
        raise QmpError(
            f"UNIX socket path '{address.path}' is too long", hint=f"Path must be less than {room} bytes"
        )
    if not address.abstract:
        return address.path
    name = b"\0" + raw
    return name if address.tight in (None, True) else name.ljust(_SUN_PATH_MAX, b"\0")


# What accept(2) tells of the client that waited, not of the listener: it is gone, or a firewall keeps it out.
CLIENT_LOST = frozenset(
    {
        errno.ECONNABORTED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENONET,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.EPERM,
        errno.EPROTO,
        errno.ETIMEDOUT,
    }
)


def accept_nowait(listener: socket.socket) -> socket.socket | None:
    """Take a waiting connection, or None when there is none (any more). Raises OSError when out of descriptors."""
    try:
        sock, _peer = listener.accept()
    except (BlockingIOError, InterruptedError):
        return None
    except OSError as error:
        if error.errno in CLIENT_LOST:
            return None
        raise
    sock.setblocking(False)
    return sock


def set_no_delay(sock: socket.socket) -> None:
    """Send small packets at once; nothing to do for sockets that are not TCP."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


# -- unix, vsock, descriptors ---------------------------------------------------------------------------------


def _listen_unix(address: UnixSocketAddress, backlog: int) -> Listener:
    if not address.abstract and not address.path:
        made_up = os.path.join(tempfile.gettempdir(), f"qemu-socket-{secrets.token_hex(4)}")
        address = attrs.evolve(address, path=made_up)  # type: ignore[misc]  # mypy cannot see attrs through @struct
    name = unix_name(address)
    if not address.abstract:
        try:
            os.unlink(address.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != errno.ENOTDIR:
                raise QmpError(f"Failed to unlink socket {address.path}: {_text(error)}") from None
    sock = _socket(socket.AF_UNIX)
    try:
        sock.bind(name)
    except OSError as error:
        sock.close()
        raise QmpError(f"Failed to bind socket to {address.path}: {_text(error)}") from None
    owned = None if address.abstract else _Owned.of(address.path)
    listener = Listener(sock, address, owned)
    _start(listener, backlog)
    return listener


def _listen_vsock(address: VsockSocketAddress, backlog: int) -> Listener:
    name = _vsock_name(address)
    sock = _socket(socket.AF_VSOCK)
    try:
        sock.bind(name)
    except OSError as error:
        sock.close()
        raise QmpError(f"Failed to bind socket: {_text(error)}") from None
    listener = Listener(sock, address)
    _start(listener, backlog)
    return listener


def _vsock_name(address: VsockSocketAddress) -> tuple[int, int]:
    numbers = []
    for what, text in (("cid", address.cid), ("port", address.port)):
        if not (text.isascii() and text.isdecimal() and int(text) < 1 << 32):
            raise QmpError(f"Failed to parse {what} '{text}'")
        numbers.append(int(text))
    return numbers[0], numbers[1]


def _start(listener: Listener, backlog: int) -> None:
    try:
        listener.socket.listen(backlog)
    except OSError as error:
        listener.close()
        raise QmpError(f"Failed to listen on socket: {_text(error)}") from None


def _adopt(address: FdSocketAddress, may_pass_fds: bool) -> socket.socket:
    if not may_pass_fds:
        raise QmpError("only QEMU supports file descriptor passing")
    text = address.str
    if _NUMBER.fullmatch(text) is None:
        raise QmpError(f"Unable to parse FD number {text}")
    if len(text) > 32 or not -(1 << 31) <= int(text) < 1 << 31:
        raise QmpError(f"Unable to parse FD number {text}: {errno_text(errno.ERANGE)}")
    try:
        sock = socket.socket(fileno=int(text))
    except (OSError, ValueError):
        raise QmpError(f"File descriptor '{text}' is not a socket") from None
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock


# -- inet -----------------------------------------------------------------------------------------------------


async def _resolve(address: InetSocketAddress, *, passive: bool) -> list[tuple[int, Any]]:
    """Family and name of each address; IPv4 first where the resolver says so."""
    if address.ipv4 is False and address.ipv6 is False:
        raise QmpError("Cannot disable IPv4 and IPv6 at same time")
    family = socket.AF_UNSPEC
    if address.ipv4 and address.ipv6:
        pass
    elif address.ipv6 or address.ipv4 is False:
        family = socket.AF_INET6
    elif address.ipv4 or address.ipv6 is False:
        family = socket.AF_INET
    # Who connects over IPv6 may name an IPv4 address, as the reference allows.
    flags = socket.AI_PASSIVE if passive else socket.AI_V4MAPPED if family == socket.AF_INET6 else 0
    if address.numeric:
        flags |= socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    # The reference does not connect to an empty host; listening, that is every address.
    host: str | None = address.host
    if passive and not host:
        host = None
    try:
        if not passive and not host:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        found = await trio.socket.getaddrinfo(
            host, address.port or ("0" if passive else ""), family, socket.SOCK_STREAM, 0, flags
        )
    except socket.gaierror as error:
        raise QmpError(f"address resolution failed for {address.host}:{address.port}: {error.strerror}") from None
    except UnicodeError:
        raise QmpError(
            f"address resolution failed for {address.host}:{address.port}: Name or service not known"
        ) from None
    return [(int(item[0]), item[4]) for item in found]


async def _listen_inet(address: InetSocketAddress, backlog: int) -> list[Listener]:
    made: list[Listener] = []
    failure: QmpError | None = None
    port: int | None = None  # port 0: the addresses of one host get the same one
    for family, name in await _resolve(address, passive=True):
        try:
            made.append(_listen_range(address, family, _with_port(name, port or name[1]), backlog))
        except QmpError as error:
            failure = failure or error
        else:
            port = made[-1].socket.getsockname()[1] if name[1] == 0 else None
    if not made:
        assert failure is not None, "the resolver gives at least one address"
        raise failure
    return made


def _listen_range(address: InetSocketAddress, family: int, name: Any, backlog: int) -> Listener:
    first = name[1]
    last = first if address.to is None else address.to
    if last < first:
        raise QmpError("Failed to create a socket")  # the reference's word for a range without a port
    failure: OSError = OSError(errno.EADDRINUSE, "")
    what = "Failed to find an available port"
    for port in range(first, last + 1):
        sock = _socket(family, _IPPROTO_MPTCP if address.mptcp else 0)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bind(sock, address, _with_port(name, port))
            sock.listen(backlog)
            _set_keep_alive(sock, address)
        except OSError as error:
            sock.close()
            failure = error
            if error.errno != errno.EADDRINUSE:
                what = "Failed to bind socket"
                break
        except QmpError:
            sock.close()
            raise
        else:
            host, bound = sock.getsockname()[:2]
            now = attrs.evolve(address, host=host, port=str(bound))  # type: ignore[misc]  # as above
            return Listener(sock, now)
    raise QmpError(f"{what}: {_text(failure)}")


def _bind(sock: socket.socket, address: InetSocketAddress, name: Any) -> None:
    if sock.family != socket.AF_INET6:
        sock.bind(name)
        return
    only = address.ipv4 is False or (address.ipv6 is True and not address.ipv4)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(only))
    try:
        sock.bind(name)
    except OSError as error:
        # The IPv4 half of the wildcard is taken (by the listener made just before, as a rule).
        if only or error.errno != errno.EADDRINUSE:
            raise
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(name)


def _with_port(name: Any, port: int) -> Any:
    return (name[0], port, *name[2:])


_KEEP_ALIVE = (
    ("keep_alive_count", socket.TCP_KEEPCNT),
    ("keep_alive_idle", socket.TCP_KEEPIDLE),
    ("keep_alive_interval", socket.TCP_KEEPINTVL),
)


def _set_keep_alive(sock: socket.socket, address: InetSocketAddress) -> None:
    """Accepted sockets inherit these from their listener."""
    if not address.keep_alive:
        return
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for attribute, option in _KEEP_ALIVE:
            value = getattr(address, attribute)
            if value:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
    except OSError as error:
        raise QmpError(f"Unable to set keep-alive option on socket: {_text(error)}") from None


# -- common ---------------------------------------------------------------------------------------------------


async def _connect_first(names: list[tuple[int, int, Any]], what: str) -> socket.socket:
    """Connect to the first name that answers; the last failure is the one told."""
    failure: OSError | None = None
    for family, proto, name in names:
        sock = _socket(family, proto)
        try:
            await _connect_one(sock, name)
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    assert failure is not None, "there is at least one name"
    raise QmpError(f"{what}: {_text(failure)}")


async def _connect_one(sock: socket.socket, name: Any) -> None:
    while True:
        try:
            sock.connect(name)
        except BlockingIOError as error:
            if error.errno == errno.EAGAIN:
                await trio.sleep(_CONNECT_RETRY_S)
                continue
            await trio.lowlevel.wait_writable(sock)
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                raise OSError(number, os.strerror(number)) from None
        else:
            await trio.lowlevel.checkpoint()
        return


def _socket(family: int, proto: int = 0) -> socket.socket:
    try:
        sock = socket.socket(family, socket.SOCK_STREAM, proto)
    except OSError as error:
        raise QmpError(f"Failed to create socket: {_text(error)}") from None
    sock.setblocking(False)
    return sock


def _plain(address: Address) -> AnySocketAddress:
    return plain_address(address) if isinstance(address, (SocketAddress, SocketAddressLegacy)) else address


def _text(error: OSError) -> str:
    return errno_text(error.errno or 0)
