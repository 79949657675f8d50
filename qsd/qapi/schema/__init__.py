"""The declarations: importing this package fills ``qsd.qapi.core.SCHEMA``."""

from qsd.qapi.schema import block, block_info, chardev, control, create, exports, jobs, objects, sockets

__all__ = ["block", "block_info", "chardev", "control", "create", "exports", "jobs", "objects", "sockets"]
