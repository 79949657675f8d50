"""Runs the program's command line many times at the price of a fork: everything is imported once.

Reads one JSON request a line, ``{"words": [...], "place": DIRECTORY, "seconds": N}``, and answers
``{"code": N, "out": TEXT, "err": TEXT}``; the code is None when the program was still running after so long.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
import tempfile
from typing import Any

import qsd.cli
import qsd.cli_options
import qsd.daemon
import qsd.life  # what a run imports, done once


def run(words: list[str], place: str, seconds: float) -> dict[str, Any]:
    """One run, in a child."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _become(words, place, out.fileno(), err.fileno())
        pidfd = os.pidfd_open(child)
        ended = bool(select.select([pidfd], [], [], seconds)[0])
        if not ended:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(pidfd)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="surrogateescape"))
    return {"code": os.waitstatus_to_exitcode(status) if ended else None, "out": texts[0], "err": texts[1]}


def _become(words: list[str], place: str, out: int, err: int) -> None:
    code = 70
    try:
        os.chdir(place)
        for number, target in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
            os.dup2(number, target)
        sys.argv = ["qsd"]
        code = qsd.cli.main(words)
    finally:
        # Not sys.exit: what is buffered, and registered for the end, belongs to the server.
        os._exit(code)


def main() -> None:
    gc.freeze()
    for line in sys.stdin:
        answer = run(**json.loads(line))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
