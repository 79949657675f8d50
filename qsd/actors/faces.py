"""What chardevs, monitors and views look like in the object tree; they live elsewhere and publish a face here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import attrs

from qsd.actors.qom import Property, QomObject, declare_type


@attrs.define(eq=False, slots=False)
class LivingFace(QomObject):
    """An object under ``/objects`` that stands for an actor: ``remove`` ends it when the object is deleted."""

    remove: Callable[[], Awaitable[None]]


@attrs.define(eq=False, slots=False)
class MonitorFace(LivingFace):
    """A QMP monitor. ``set_pretty`` makes it write for human eyes, or not, from the next message on."""

    typename = "monitor-qmp"

    chardev: str
    pretty: bool
    set_pretty: Callable[[bool], None]
    close_action: str = "none"


@attrs.define(eq=False, slots=False)
class ViewFace(LivingFace):
    """The daemon as a directory; ``allow_other`` is on, off or auto."""

    typename = "qsd-view"

    mountpoint: str
    allow_other: str


@attrs.define(eq=False, slots=False)
class ChardevFace(QomObject):
    """A chardev under ``/chardevs``; ``backend`` is its kind on the wire (``null``, ``stdio``)."""

    backend: str

    @property
    def typename(self) -> str:  # type: ignore[override]  # one class for all kinds without properties of their own
        return f"chardev-{self.backend}"


@attrs.define(eq=False, slots=False)
class SocketChardevFace(QomObject):
    """A socket chardev: also says whether a peer is there, and the address as JSON (``SocketAddress``)."""

    typename = "chardev-socket"

    connected: Callable[[], bool]
    addr: Callable[[], Any]


def _set_pretty(item: MonitorFace, value: bool) -> None:
    item.pretty = value
    item.set_pretty(value)


declare_type("monitor", "object", abstract=True)
declare_type(
    "monitor-qmp",
    "monitor",
    Property("chardev", "string", lambda item: item.chardev),
    Property("pretty", "bool", lambda item: item.pretty, bool, _set_pretty),
    Property("close-action", "MonitorQMPCloseAction", lambda item: item.close_action),
)
declare_type(
    "qsd-view",
    "object",
    Property("mountpoint", "string", lambda item: item.mountpoint),
    Property("allow-other", "OnOffAuto", lambda item: item.allow_other),
    user_creatable=True,
)
declare_type("chardev", "object", abstract=True)
declare_type("chardev-fd", "chardev", abstract=True)
declare_type("chardev-file", "chardev-fd")
declare_type("chardev-null", "chardev")
declare_type("chardev-pipe", "chardev-fd")
declare_type("chardev-pty", "chardev")
declare_type("chardev-ringbuf", "chardev")
declare_type("chardev-memory", "chardev-ringbuf")
declare_type("chardev-stdio", "chardev-fd")
declare_type(
    "chardev-socket",
    "chardev",
    Property("connected", "bool", lambda item: item.connected()),
    Property("addr", "SocketAddress", lambda item: item.addr()),
)
