"""The mode a node is opened in: defaults, what an inline child takes over, contradictions."""

from __future__ import annotations

from typing import Any

import pytest

from qsd.actors.node_options import check_mode, resolve_mode
from qsd.drivers.base import ChildRole, DetectZeroes, Mode
from qsd.errors import QmpError
from qsd.qapi.schema.block import (
    BlockdevCacheOptions,
    BlockdevDetectZeroesOptions,
    BlockdevDiscardOptions,
    BlockdevDriver,
    BlockdevOptionsFile,
)

PARENT = Mode(
    read_only=True,
    auto_read_only=True,
    force_share=True,
    discard_unmap=True,
    detect_zeroes=DetectZeroes.ON,
    cache_direct=True,
    cache_no_flush=True,
    active=False,
)


def options(**given: Any) -> BlockdevOptionsFile:
    return BlockdevOptionsFile(driver=BlockdevDriver.FILE, filename="f", **given)


def test_defaults() -> None:
    assert resolve_mode(options()) == Mode()


def test_inline_child_takes_over_what_is_inherited_and_nothing_else() -> None:
    assert resolve_mode(options(), PARENT) == Mode(
        read_only=True,
        auto_read_only=True,
        force_share=True,
        discard_unmap=True,
        cache_direct=True,
        cache_no_flush=True,
        active=False,
    )
    assert not resolve_mode(options(active=True), PARENT).active


def test_inline_child_says_otherwise() -> None:
    given = options(
        read_only=False,
        auto_read_only=False,
        force_share=False,
        discard=BlockdevDiscardOptions.IGNORE,
        cache=BlockdevCacheOptions(direct=False),
    )
    assert resolve_mode(given, PARENT) == Mode(cache_no_flush=True, active=False)


def test_backing_file_is_not_unmapped_by_default() -> None:
    assert not resolve_mode(options(), Mode(), ChildRole.COW).discard_unmap
    assert resolve_mode(options(), Mode(), ChildRole.DATA).discard_unmap


def test_contradictions() -> None:
    unmap = BlockdevDetectZeroesOptions.UNMAP
    for given, text in [
        (options(force_share=True), "force-share=on can only be used with read-only images"),
        (options(force_share=True, auto_read_only=True), "force-share=on can only be used with read-only images"),
        (
            options(detect_zeroes=unmap),
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ),
    ]:
        with pytest.raises(QmpError) as caught:
            check_mode(resolve_mode(given))
        assert caught.value.desc == text
    check_mode(resolve_mode(options(detect_zeroes=unmap, discard=BlockdevDiscardOptions.UNMAP)))
    check_mode(resolve_mode(options(force_share=True, read_only=True)))
