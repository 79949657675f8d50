"""UTF-8 as the reference reads and writes it: no noncharacters, and a NUL is C0 80, so that texts may hold one.

Inside the program such a NUL is the two bytes as ``surrogateescape`` decodes them: whatever becomes of a text, a
file's name, a name in an image or on the wire, then has the bytes the reference gives it.
"""

from __future__ import annotations

import re
from typing import Final

NUL: Final = "\udcc0\udc80"
NONCHARACTER = re.compile(
    "[\ufdd0-\ufdef" + "".join(chr((plane << 16) | last) for plane in range(17) for last in (0xFFFE, 0xFFFF)) + "]"
)

# A lead byte with what belongs to it, or a byte that belongs to nothing.
_SEQUENCE = re.compile(
    rb"[\x00-\x7f]+|[\xc0-\xdf][\x80-\xbf]?|[\xe0-\xef][\x80-\xbf]{0,2}|[\xf0-\xf7][\x80-\xbf]{0,3}"
    rb"|[\xf8-\xfb][\x80-\xbf]{0,4}|[\xfc-\xfd][\x80-\xbf]{0,5}|[\x80-\xff]"
)


def decode(data: bytes) -> str:
    """The text; raises ValueError for anything that is not one."""
    if data.isascii():
        return data.decode("ascii")
    text = NUL.join(part.decode("utf-8") for part in data.split(b"\xc0\x80"))
    if NONCHARACTER.search(text):
        raise ValueError("a noncharacter")
    return text


def decode_leniently(data: bytes) -> str:
    """The text, with one U+FFFD for each broken sequence. Never raises."""
    found = []
    for match in _SEQUENCE.finditer(data):
        try:
            found.append(decode(match.group()))
        except ValueError:
            found.append("\ufffd")
    return "".join(found)


def encode(text: str) -> bytes:
    """The bytes of a text: ``decode`` gives it back."""
    return text.encode("utf-8", "surrogateescape")
