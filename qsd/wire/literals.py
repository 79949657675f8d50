"""Scalars as the command line spells them: booleans, C integers, byte counts with units."""

from __future__ import annotations

import re

_TRUE = frozenset(("on", "yes", "true", "y"))
_FALSE = frozenset(("off", "no", "false", "n"))
_BLANKS = r"[ \t\n\v\f\r]*"
_INTEGER = re.compile(_BLANKS + r"([+-]?)(?:0[xX]([0-9a-fA-F]+)|(0[0-7]*)|([1-9][0-9]*))")
_SIZE = re.compile(
    _BLANKS + r"\+?(?:0[xX](?P<hex>[0-9a-fA-F]+)"
    r"|(?P<whole>[0-9]*)(?:\.(?P<fraction>[0-9]*))?(?P<unit>[bkmgtpeBKMGTPE]?))"
)
_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50, "E": 1 << 60}
_LENGTH_LIMIT = 400  # longer cannot be in range, and int() of megabytes of digits would take its time


def parse_bool(text: str) -> bool | None:
    """Read a boolean; None if it is none."""
    return True if text in _TRUE else False if text in _FALSE else None


def parse_integer(text: str) -> int | None:
    """Read a C integer literal (decimal, 0x, octal; a sign and leading blanks allowed); None if it is none."""
    match = _INTEGER.fullmatch(text) if len(text) < _LENGTH_LIMIT else None
    if match is None:
        return None
    sign, hexadecimal, octal, decimal = match.groups()
    value = int(hexadecimal, 16) if hexadecimal else int(octal, 8) if octal else int(decimal)
    return -value if sign == "-" else value


def parse_size(text: str) -> int | None:
    """Read a number of bytes with an optional unit; None if it is none.

    Units are powers of 1024 (B, K, M, G, T, P, E, in either case); with one a fraction is allowed and rounded, and
    hexadecimal numbers take none. The result may not fit 64 bits: what that means is the caller's to say.
    """
    match = _SIZE.fullmatch(text) if len(text) < _LENGTH_LIMIT else None
    if match is None:
        return None
    if match["hex"]:
        return int(match["hex"], 16)
    whole, fraction, unit = match["whole"], match["fraction"] or "", _UNITS[match["unit"].upper()]
    if not whole and not fraction:
        return None
    if fraction.strip("0") and unit == 1:
        return None
    if match["unit"] and int(whole or "0") >> 64:
        return None
    scale: int = 10 ** len(fraction)
    rounded: int = (int(fraction or "0") * unit * 2 + scale) // (2 * scale)
    return int(whole or "0") * unit + rounded
