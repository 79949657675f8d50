"""Exports and the NBD server."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from qsd.qapi.core import SCHEMA, Alternate, Command, Event, Uint32, branch, enum, struct, union
from qsd.qapi.schema.bitmaps import BlockDirtyBitmapOrStr
from qsd.qapi.schema.sockets import SocketAddress, SocketAddressLegacy


@enum("BlockExportType")
class BlockExportType(str, Enum):
    NBD = "nbd"
    FUSE = "fuse"


@enum("BlockExportRemoveMode")
class BlockExportRemoveMode(str, Enum):
    SAFE = "safe"
    HARD = "hard"


# One iothread, or several to serve the export's clients from.
BlockExportIothreads = Annotated[str | tuple[str, ...], Alternate("BlockExportIothreads")]


@union("BlockExportOptions", tag="type")
class BlockExportOptions:
    type: BlockExportType
    id: str
    fixed_iothread: bool | None = None
    iothread: BlockExportIothreads | None = None
    node_name: str
    writable: bool | None = None
    writethrough: bool | None = None
    allow_inactive: bool | None = None


@branch(BlockExportOptions, BlockExportType.NBD, name="BlockExportOptionsNbd")
class BlockExportOptionsNbd(BlockExportOptions):
    name: str | None = None
    description: str | None = None
    bitmaps: tuple[BlockDirtyBitmapOrStr, ...] | None = None
    allocation_depth: bool | None = None


@enum("FuseExportAllowOther")
class FuseExportAllowOther(str, Enum):
    OFF = "off"
    ON = "on"
    AUTO = "auto"


@branch(BlockExportOptions, BlockExportType.FUSE, name="BlockExportOptionsFuse")
class BlockExportOptionsFuse(BlockExportOptions):
    mountpoint: str
    growable: bool | None = None
    allow_other: FuseExportAllowOther | None = None


@struct("block-export-del-arg")
class BlockExportDelArgs:
    id: str
    mode: BlockExportRemoveMode | None = None


@struct("BlockExportInfo")
class BlockExportInfo:
    id: str
    type: BlockExportType
    node_name: str
    shutting_down: bool


@struct("BLOCK_EXPORT_DELETED-arg")
class BlockExportDeletedData:
    id: str


@struct("NbdServerOptionsBase")
class NbdServerOptionsBase:
    """For both numbers 0 means no limit; the defaults are 10 seconds and 100 connections."""

    handshake_max_seconds: Uint32 | None = None
    tls_creds: str | None = None
    tls_authz: str | None = None
    max_connections: Uint32 | None = None


@struct("NbdServerOptions")
class NbdServerOptions(NbdServerOptionsBase):
    """The argument of ``--nbd-server``; not reachable through QMP."""

    addr: SocketAddress


@struct("NbdServerOptionsLegacy")
class NbdServerOptionsLegacy(NbdServerOptionsBase):
    """The arguments of ``nbd-server-start``."""

    addr: SocketAddressLegacy


@struct("NbdServerAddOptions")
class NbdServerAddOptions:
    name: str | None = None
    description: str | None = None
    device: str
    writable: bool | None = None
    bitmap: str | None = None


@struct("nbd-server-remove-arg")
class NbdServerRemoveArgs:
    name: str
    mode: BlockExportRemoveMode | None = None


SCHEMA.declare(
    Command("nbd-server-start", args=NbdServerOptionsLegacy),
    Command("nbd-server-add", args=NbdServerAddOptions, features=("deprecated",)),
    Command("nbd-server-remove", args=NbdServerRemoveArgs, features=("deprecated",)),
    Command("nbd-server-stop"),
    Command("block-export-add", args=BlockExportOptions),
    Command("block-export-del", args=BlockExportDelArgs),
    Command("query-block-exports", returns=tuple[BlockExportInfo, ...]),
    Event("BLOCK_EXPORT_DELETED", data=BlockExportDeletedData),
)
