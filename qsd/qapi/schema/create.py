"""``blockdev-create`` and ``x-blockdev-amend``: the options of new images, and of changes to existing ones.

A format adds its branches here, and its creator to ``qsd.drivers.registry.CREATORS``.
"""

from __future__ import annotations

from enum import Enum

from qsd.qapi.core import SCHEMA, Command, Size, branch, enum, struct, union
from qsd.qapi.schema.block import BlockdevDriver


@enum("PreallocMode")
class PreallocMode(str, Enum):
    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


@union("BlockdevCreateOptions", tag="driver")
class BlockdevCreateOptions:
    """What a new image is made from; a value is one of the subclasses below, chosen by ``driver``."""

    driver: BlockdevDriver


@branch(BlockdevCreateOptions, BlockdevDriver.FILE, name="BlockdevCreateOptionsFile")
class BlockdevCreateOptionsFile(BlockdevCreateOptions):
    """``size`` and ``extent_size_hint`` in bytes."""

    filename: str
    size: Size
    preallocation: PreallocMode | None = None
    nocow: bool | None = None
    extent_size_hint: Size | None = None


@struct("blockdev-create-arg")
class BlockdevCreateArgs:
    job_id: str
    options: BlockdevCreateOptions


@union("BlockdevAmendOptions", tag="driver")
class BlockdevAmendOptions:
    """What is to change in an image; a format adds its branch."""

    driver: BlockdevDriver


@struct("x-blockdev-amend-arg")
class BlockdevAmendArgs:
    job_id: str
    node_name: str
    options: BlockdevAmendOptions
    force: bool | None = None


SCHEMA.declare(
    Command("blockdev-create", args=BlockdevCreateArgs),
    Command("x-blockdev-amend", args=BlockdevAmendArgs, features=("unstable",)),
)
