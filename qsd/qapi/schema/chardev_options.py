"""The options of ``--chardev``: one table for all backends, as this command line has no structure."""

from __future__ import annotations

from qsd.wire.qemuopts import OptionKind, OptionTable

_STRING, _BOOL, _NUMBER, _SIZE = OptionKind.STRING, OptionKind.BOOL, OptionKind.NUMBER, OptionKind.SIZE

CHARDEV_OPTIONS = OptionTable(
    {
        "abstract": _BOOL,
        "append": _BOOL,
        "backend": _STRING,
        "delay": _BOOL,
        "fd": _STRING,
        "host": _STRING,
        "input-path": _STRING,
        "ipv4": _BOOL,
        "ipv6": _BOOL,
        "logappend": _BOOL,
        "logfile": _STRING,
        "logtimestamp": _BOOL,
        "nodelay": _BOOL,
        "path": _STRING,
        "port": _STRING,
        "reconnect-ms": _NUMBER,
        "server": _BOOL,
        "signal": _BOOL,
        "size": _SIZE,
        "telnet": _BOOL,
        "tight": _BOOL,
        "tls-authz": _STRING,
        "tls-creds": _STRING,
        "tn3270": _BOOL,
        "to": _NUMBER,
        "wait": _BOOL,
        "websocket": _BOOL,
    },
    implied="backend",
    short_forms={"delay": ("nodelay", "off"), "nodelay": ("nodelay", "on")},
)
