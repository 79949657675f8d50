"""Standard output and error, as a daemon has to treat them: whoever reads them may have gone, or the disk behind
them be full, and that must not disturb anything. Both are written past Python's buffers, which would fail again at
exit; undecodable bytes of arguments come out as they came in."""

from __future__ import annotations

import os


def write_stdout(text: str) -> bool:
    """Write at once; False when not everything was taken."""
    return _write(1, text)


def write_stderr(text: str) -> None:
    """Write at once. What nobody takes is lost."""
    _write(2, text)


def _write(number: int, text: str) -> bool:
    data = text.encode("utf-8", "surrogateescape")
    try:
        while data:
            data = data[os.write(number, data) :]
    except OSError:
        return False
    return True
