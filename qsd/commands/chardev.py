"""Commands about character devices."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from qsd.commands.context import Context
from qsd.commands.registry import command
from qsd.errors import QmpError
from qsd.servers.chardev.backends import RingbufChardev
from qsd.servers.chardev.table import BACKENDS


@command("chardev-add")
async def chardev_add(context: Context, args: Any) -> dict[str, str]:
    """Make a chardev; a pty's answer names it."""
    try:
        made = await context.services.chardevs.add(args.id, args.backend)
    except QmpError as error:
        if error.desc.startswith("Chardev with id"):
            raise
        raise error.prefixed(f"Failed to add chardev '{args.id}': ") from None
    return made.result()


@command("chardev-remove")
async def chardev_remove(context: Context, args: Any) -> None:
    """Delete a chardev nobody uses."""
    await context.services.chardevs.remove(args.id)


@command("query-chardev")
async def query_chardev(context: Context, _args: Any) -> list[dict[str, Any]]:
    """All chardevs, newest first."""
    return [
        {"label": item.label, "filename": item.filename(), "frontend-open": item.frontend is not None}
        for item in reversed(context.services.chardevs.all())
    ]


@command("query-chardev-backends")
async def query_chardev_backends(_context: Context, _args: Any) -> list[dict[str, str]]:
    """The kinds there are."""
    return [{"name": name} for name in BACKENDS]


def _ringbuf(context: Context, name: str) -> RingbufChardev:
    found = context.services.chardevs.find(name)
    if found is None:
        raise QmpError(f"Device '{name}' not found")
    if not isinstance(found, RingbufChardev):
        raise QmpError(f"{name} is not a ringbuf device")
    return found


def _is_base64(args: Any) -> bool:
    return args.format is not None and args.format.value == "base64"


@command("ringbuf-write")
async def ringbuf_write(context: Context, args: Any) -> None:
    """Add text, or bytes in base64."""
    ring = _ringbuf(context, args.device)
    data = args.data.encode()
    if _is_base64(args):
        try:
            data = base64.b64decode(args.data, validate=True)
        except binascii.Error:
            raise QmpError("Base64 data contains invalid characters") from None
    ring.write(data)


@command("ringbuf-read")
async def ringbuf_read(context: Context, args: Any) -> str:
    """Take bytes out: as base64, or as text that ends at a NUL."""
    ring = _ringbuf(context, args.device)
    if args.size <= 0:
        raise QmpError("size must be greater than zero")
    data = ring.take(args.size)
    if _is_base64(args):
        return base64.b64encode(data).decode()
    return data.split(b"\0", 1)[0].decode("utf-8", "replace")
