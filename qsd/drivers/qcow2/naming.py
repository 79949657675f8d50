"""The other files of an image: those it names, or those the options give it instead."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from qsd.drivers.base import ChildRole
from qsd.drivers.filenames import place_of
from qsd.drivers.implicit import format_options, plain_options
from qsd.drivers.qcow2 import facts
from qsd.drivers.qcow2.layout import EXT_BACKING_FORMAT, EXT_DATA_FILE, MAX_BACKING_NAME
from qsd.errors import QmpError
from qsd.qapi.core import NULL

if TYPE_CHECKING:
    from qsd.drivers.qcow2.driver import Qcow2Driver
    from qsd.drivers.qcow2.image import Image


async def open_data_file(driver: Qcow2Driver) -> None:
    """Let the guest's data be in the data file, where the image has one. Raises QmpError."""
    image, wanted = driver.image, driver.options.data_file
    if wanted is not None and "data-file" not in driver.children:
        await driver.host.open_child("data-file", ChildRole.DATA, wanted)
    if not image.header.has_data_file:
        if wanted is not None:
            raise QmpError("'data-file' can only be set for images with an external data file")
        return
    if "data-file" not in driver.children:
        name = image.header.extension(EXT_DATA_FILE)
        if name is None:
            raise QmpError("'data-file' is required for this image")
        await driver.host.open_child("data-file", ChildRole.DATA, plain_options(facts.text(name)))
    image.map.data = driver.children["data-file"]


def backing_name(image: Image) -> str:
    """As the image has it; empty for none."""
    return facts.text(image.header.backing_file or b"")


async def open_backing(driver: Qcow2Driver) -> None:
    """Open the backing file. Raises QmpError."""
    wanted = driver.options.backing
    driver.own_backing = backing_name(driver.image)
    if wanted == "":
        # How no backing file was asked for before there was null.
        driver.host.warn('qsd: warning: Use of "backing": "" is deprecated; use "backing": null instead')
        return
    if "backing" in driver.children or wanted is NULL:
        return
    if wanted is not None:
        await driver.host.open_child("backing", ChildRole.COW, wanted)
    elif driver.own_backing:
        options, is_probed = _named_backing(driver)
        await driver.host.open_child("backing", ChildRole.COW, options, is_probed=is_probed)
        driver.own_backing = facts.name_of(driver.children["backing"])


def _named_backing(driver: Qcow2Driver) -> tuple[Any, bool]:
    kind = driver.image.header.extension(EXT_BACKING_FORMAT)
    try:
        return format_options(driver.own_backing, place_of(driver), (facts.text(kind) or None) if kind else None)
    except QmpError as error:
        raise error.prefixed("Could not open backing file: ") from None


async def change_backing_file(driver: Qcow2Driver, name: str, kind: str) -> None:
    """Write another backing file's name into the header; an empty one is none. Raises OSError."""
    image = driver.image
    shown = name.encode("utf-8", "surrogateescape")
    if len(shown) > MAX_BACKING_NAME or (shown and image.header.is_data_file_raw):
        raise OSError(errno.EINVAL, "not a name for a backing file")
    header = image.header.with_extension(EXT_BACKING_FORMAT, kind.encode() if shown and kind else None)
    await image.change_header(backing_file=shown or None, extensions=header.extensions)
    driver.own_backing = name
