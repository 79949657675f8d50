"""Error texts are the C library's, word for word."""

from __future__ import annotations

import errno
import os

import pytest

from qsd.errors import errno_text


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_every_errno_has_the_text_of_the_c_library(number: int) -> None:
    assert errno_text(number) == os.strerror(number)


@pytest.mark.parametrize("number", [0x1000, 99999])
def test_unknown_errno_is_told_by_number(number: int) -> None:
    assert errno_text(number) == os.strerror(number)
