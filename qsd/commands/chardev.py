"""Commands about character devices."""

from __future__ import annotations

import base64

from qsd.actors.secret import decode_base64
from qsd.commands.context import Context
from qsd.commands.registry import command
from qsd.qapi.schema.chardev import (
    ChardevAddArgs,
    ChardevBackendInfo,
    ChardevInfo,
    ChardevRemoveArgs,
    ChardevReturn,
    DataFormat,
    RingbufReadArgs,
    RingbufWriteArgs,
)
from qsd.wire import modified_utf8


@command("chardev-add")
async def chardev_add(context: Context, args: ChardevAddArgs) -> ChardevReturn:
    """Make a chardev; a pty's answer names it."""
    return await context.services.chardevs.add(args.id, args.backend)


@command("chardev-remove")
async def chardev_remove(context: Context, args: ChardevRemoveArgs) -> None:
    """Close a chardev nobody uses."""
    await context.services.chardevs.remove(args.id)


@command("query-chardev")
async def query_chardev(context: Context, _args: None) -> list[ChardevInfo]:
    """All chardevs."""
    return await context.services.chardevs.query()


@command("query-chardev-backends")
async def query_chardev_backends(context: Context, _args: None) -> list[ChardevBackendInfo]:
    """The kinds there are."""
    return context.services.chardevs.backends()


@command("ringbuf-write")
async def ringbuf_write(context: Context, args: RingbufWriteArgs) -> None:
    """Add text, or bytes in base64."""
    data = modified_utf8.encode(args.data)
    if args.format is DataFormat.BASE64:
        context.services.chardevs.check_ring(args.device)
        data = decode_base64(data)
    await context.services.chardevs.write_ring(args.device, data)


@command("ringbuf-read")
async def ringbuf_read(context: Context, args: RingbufReadArgs) -> str:
    """Take bytes out: as base64, or as text, which ends at a bare NUL (those of texts are written C0 80)."""
    data = await context.services.chardevs.read_ring(args.device, args.size)
    if args.format is DataFormat.BASE64:
        return base64.b64encode(data).decode("ascii")
    return modified_utf8.decode_leniently(data.partition(b"\0")[0])
