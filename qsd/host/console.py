"""Standard output and error, as a daemon has to treat them: whoever reads them may have gone, or does not read, or
the disk behind them is full, and that must not disturb anything. Both are written past Python's buffers, which
would fail again at exit; undecodable bytes of arguments come out as they came in."""

from __future__ import annotations

import os
import select

# Milliseconds standard error may take to have room; the loop waits meanwhile.
PATIENCE_MS = 100
# What a pipe that has any room at all takes without blocking (pipe(7)).
_PIECE = 4096

_is_stuck = False


def write_stdout(text: str) -> bool:
    """Write at once; False when not everything was taken."""
    data = _encoded(text)
    try:
        while data:
            data = data[os.write(1, data) :]
    except OSError:
        return False
    return True


def write_stderr(text: str) -> None:
    """Write at once. What nobody takes is lost: soon, and at once as long as nobody has taken anything since."""
    global _is_stuck
    data = _encoded(text)
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    try:
        while data:
            _is_stuck = not poll.poll(0 if _is_stuck else PATIENCE_MS)
            if _is_stuck:
                return
            data = data[os.write(2, data[:_PIECE]) :]
    except OSError:
        return


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
